"""Accuracy over wall-clock: pre-train several recipes for equal epochs and equal time, fine-tune, evaluate.

    python benchmarks/time_to_accuracy.py mae.yaml fast.yaml aemim.yaml --epochs 5 --seeds 1 2

The first recipe is the baseline. It is trained for the epochs of the others, and again for as many as
take the seconds that each slower one takes. With `--shares 0.65` the others are trained for as long as 0.65
of the baseline's seconds, too; with `--from-scratch` the baseline for none. Seconds are batches times the
seconds of a batch, measured before in turns; those that passed while a run trained stand beside them. Probes
count in neither.

Stopped at any time, the same command goes on. Runs that may use the same core or GPU wait for one another;
`taskset -c 0` and `taskset -c 1` with other `--seeds` share the work, and `--finished` with all seeds puts it
together.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from end_to_end import turn
from lanes import reserved
from record import environment, write_json
from study import Job, Recipes, batches_per_epoch, check, make_runs, settings_of
from study_options import add_stage_options, ended, read_stage_options
from study_plots import draw
from study_tables import table
from turns import measure

from aemim_algorithm.recipes.layers import RecipeError

PLAN = "plan.json"
_SAME = 0.05  # costs that differ by less are one run
# A batch of the baseline that changes no weight in float32, so that its encoder is the initialisation.
_UNTRAINED = ("optimizer.base_learning_rate=1.0e-30", "schedule.warmup=0ba")


def jobs_of(options: argparse.Namespace, plan: Mapping[str, Any]) -> list[Job]:
    """All runs: for each seed first those of equal epochs, then those of equal time, then without training.

    Args:
        options: The command line.
        plan: Of :func:`calibrate`.
    """
    seconds = {method: statistics.median(plan["batch_seconds"][method]) for method in options.methods}
    per_epoch = plan["batches_per_epoch"]
    base, *others = options.methods
    whole = {method: round(options.epochs * per_epoch[method]) for method in options.methods}
    lengths = [(method, whole[method]) for method in options.methods]
    costs: list[float] = []
    for method in others if options.at_equal_time is None else options.at_equal_time:
        cost = seconds[method] * whole[method] / (seconds[base] * whole[base])
        if all(abs(cost / other - 1) > _SAME for other in [1.0, *costs]):
            costs.append(cost)
    lengths += [(base, round(cost * whole[base])) for cost in costs if cost > 1]
    for share in options.shares:
        budget = share * seconds[base] * whole[base]
        lengths += [
            (method, max(1, round(budget / seconds[method]))) for method in options.at_shares or others
        ]
    jobs = []
    for seed in options.seeds:
        jobs += [
            Job(method, options.methods[method], batches, seed) for method, batches in dict.fromkeys(lengths)
        ]
        if options.from_scratch:
            jobs.append(Job(base, options.methods[base], 1, seed, _UNTRAINED))
    return jobs


def calibrate(options: argparse.Namespace, recipes: Recipes) -> dict[str, Any]:
    """Measure the seconds of a batch of every recipe, in turns; once for a folder of runs.

    A recipe that comes later is measured beside the baseline, whose first figures stay.

    Returns:
        ``batch_seconds``, one entry a round, and ``batches_per_epoch``, by method; ``settings``,
        ``environment`` and ``as_measured`` of each.

    Raises:
        RecipeError: If a recipe cannot run here, the folder's figures are of other settings or cores, or it
            has none and nothing is to be run.
        ConversionError: If the images cannot be converted.
    """
    file, settings = recipes.folder / PLAN, _settings(options, recipes)
    recipes.folder.mkdir(parents=True, exist_ok=True)
    with open(recipes.folder / f".{PLAN}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the same study may be at it
        plan: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        known: dict[str, str] = plan.get("settings", {})
        for method in options.methods:
            if method in known and known[method] != settings[method]:
                raise RecipeError(
                    f"{file} was measured with another recipe {method}, or on other cores: choose another "
                    "--runs"
                )
        if missing := [method for method in options.methods if method not in known]:
            if options.finished:
                raise RecipeError(f"{file}: {missing[0]} was not timed, so nothing of it is finished there")
            base = next(iter(options.methods))
            with reserved():
                found = _measured(options, recipes, list(dict.fromkeys([base, *missing])))
            plan = _joined(plan, found, base) | {"settings": known | settings}
            write_json(plan, file)
    return plan


def _joined(plan: Mapping[str, Any], found: Mapping[str, Any], base: str) -> dict[str, Any]:
    """Add what was found of new methods, at the speed that the baseline had when it was first measured.

    ``as_measured`` keeps the rounds themselves, and those of the baseline beside them.
    """
    seconds, old = found["batch_seconds"], plan.get("batch_seconds", {}).get(base)
    speed = statistics.median(old) / statistics.median(seconds[base]) if old else 1.0
    parts = dict(found) | {
        "batch_seconds": {method: [speed * each for each in values] for method, values in seconds.items()},
        "as_measured": {
            method: {"batch_seconds": values, "baseline": seconds[base], "scaled_by": speed}
            for method, values in seconds.items()
        },
    }
    return {part: values | plan.get(part, {}) for part, values in parts.items()}


def _settings(options: argparse.Namespace, recipes: Recipes) -> dict[str, str]:
    """What the seconds of a method depend on."""
    on_gpu = options.device == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"{len(os.sched_getaffinity(0))} cores"
    told = [*recipes.overrides["pretrain"], "run_name=any", "save_folder=any"]
    return {
        method: f"{where}: {settings_of('pretrain', [str(path), *told])}"
        for method, path in options.methods.items()
    }


def _measured(options: argparse.Namespace, recipes: Recipes, methods: Sequence[str]) -> dict[str, Any]:
    threads = len(os.sched_getaffinity(0))
    here = environment("benchmarks/time_to_accuracy.py", sys.argv[1:]) | {"cores": threads}
    told = [*recipes.overrides["pretrain"], "evaluate=false"]
    timed = [*told, f"max_duration={options.batches}ba", "schedule.warmup=0ba"]
    paths = {method: options.methods[method] for method in methods}
    per_epoch = {method: batches_per_epoch(path, told) for method, path in paths.items()}
    print(f"timing {options.rounds} turns of {options.batches} batches", file=sys.stderr, flush=True)
    with TemporaryDirectory() as scratch:
        contenders = {
            method: partial(
                turn, path, [*timed, f"save_folder={scratch}/{number}"], options.batches, options.device
            )
            for number, (method, path) in enumerate(paths.items())
        }
        found = measure(contenders, rounds=options.rounds, device=options.device, threads=threads)
    return {
        "batch_seconds": {name: [part["batch"] for part in row["parts"]] for name, row in found.items()},
        "batches_per_epoch": per_epoch,
        "environment": dict.fromkeys(methods, here),
    }


def summary(
    options: argparse.Namespace, plan: Mapping[str, Any], outcomes: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """All that was found, as it is written."""
    seconds = {method: statistics.median(values) for method, values in plan["batch_seconds"].items()}
    runs = [
        {key: value for key, value in outcome.items() if key != "losses"}
        | {"measured_seconds": outcome["seconds"], "seconds": outcome["batches"] * seconds[outcome["method"]]}
        for outcome in outcomes
    ]
    return {
        "baseline": next(iter(options.methods)),
        "epochs": options.epochs,
        "batches_per_epoch": plan["batches_per_epoch"],
        "batch_seconds": plan["batch_seconds"],
        "as_measured": plan.get("as_measured", {}),
        "timed_in": plan["environment"],
        "overrides": options.overrides,
        "runs": runs,
    }


def main(arguments: Sequence[str]) -> int:
    return ended(partial(_main, arguments))


def _main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    result, recipes = environment("benchmarks/time_to_accuracy.py", arguments), options.recipes
    for method, path in options.methods.items():
        check(Job(method, path, 10**6, options.seeds[0]), recipes)
    plan = calibrate(options, recipes)
    jobs = jobs_of(options, plan)
    if not all(job.batches for job in jobs):
        raise RecipeError(f"--epochs={options.epochs}: expected at least a batch of every recipe")
    _announce(jobs, plan)
    outcomes, whole = make_runs(jobs, recipes, finished=options.finished)
    if outcomes:
        result |= summary(options, plan, outcomes)
        write_json(result, options.out)
        draw(result, options.out.with_suffix(".png"))
        print(table(result))
    return 0 if whole else 1


def _announce(jobs: Sequence[Job], plan: Mapping[str, Any]) -> None:
    total = sum(job.batches * statistics.median(plan["batch_seconds"][job.method]) for job in jobs)
    print(f"{len(jobs)} runs, about {total / 60:.0f} minutes of pre-training", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; ends with code 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "words",
        nargs="+",
        metavar="RECIPE",
        help="of pre-training, the baseline first; and key=value overrides, those of the other stages as "
        "finetune.key=value and evaluate.key=value",
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--epochs", type=float, required=True, help="of the equal-epochs runs")
    add_stage_options(parser)
    parser.add_argument(
        "--shares", type=float, nargs="*", default=[], help="shorter runs: shares of the baseline's seconds"
    )
    parser.add_argument(
        "--at-shares", nargs="*", metavar="METHOD", help="methods of these (default: all but the baseline)"
    )
    parser.add_argument(
        "--at-equal-time",
        nargs="*",
        metavar="METHOD",
        help="methods for whose seconds the baseline is trained, too (default: all)",
    )
    parser.add_argument(
        "--from-scratch", action="store_true", help="the baseline's random initialisation, too: a batch of it"
    )
    parser.add_argument("--out", type=Path, default=Path("time_to_accuracy.json"))
    parser.add_argument("--rounds", type=int, default=5, help="turns in which a batch is timed")
    parser.add_argument("--batches", type=int, default=50 if on_gpu else 6, help="of a turn")
    options = parser.parse_intermixed_args(arguments)
    paths = read_stage_options(parser, options, options.words)
    options.methods = {path.stem: path for path in paths}
    options.device = "cuda" if on_gpu else "cpu"
    if options.epochs <= 0 or any(not share > 0 for share in options.shares):
        parser.error("--epochs and --shares: expected more than 0")
    for name, low in (("rounds", 1), ("batches", 2)):
        if getattr(options, name) < low:
            parser.error(f"--{name}={getattr(options, name)}: expected at least {low}")
    others = list(options.methods)[1:]
    for option in ("at_shares", "at_equal_time"):
        for method in getattr(options, option) or []:
            if method not in others:
                name = option.replace("_", "-")
                parser.error(f"--{name}={method}: expected one of {', '.join(others)}")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
