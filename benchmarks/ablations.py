"""The paper's ablations (Table 8, Figures 2 and 4) on a recipe of AEMIM, its numbers beside ours.

    python benchmarks/ablations.py aemim.yaml --baseline mae.yaml --epochs 4 --groups epsilon steps

Every setting is pre-trained for the same epochs, fine-tuned and evaluated, as `time_to_accuracy.py` does it.
The paper's numbers are top-1 on ImageNet-1K of ViT-S/16, pre-trained for 300 epochs. Groups that it does not
have say what else could matter at a small scale. Stopped at any time, the same command goes on.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from record import environment, write_json
from study import Job, batches_per_epoch, check, make_runs
from study_options import add_stage_options, ended, read_stage_options
from study_plots import grid, score_title, shown_scores
from study_tables import cell, mean_and_deviation, score_names

from aemim_algorithm import AEMIM
from aemim_algorithm.evaluation.plots import COLOURS, Point, draw_curves, save_figure
from aemim_algorithm.recipes.layers import RecipeError
from aemim_algorithm.recipes.schema import load_recipe

BASELINE, DEFAULT = "without AEMIM", "AEMIM"
PAPER = {BASELINE: 80.9, DEFAULT: 81.4}
"""Tables 4 and 8: top-1 in percent, ViT-S/16."""

_SPAN = 5.0  # points that an axis shows at least: what is nearly equal shall look so
_FIGURE_2 = {DEFAULT: "feature distance (l2)", "loss reconstruction": "reconstruction loss"}
_LOSSES = {"loss/train/clean": "clean", "loss/train/adversarial": "adversarial"}


@dataclass(frozen=True)
class Group:
    """Settings that differ in one thing.

    Attributes:
        title: What the table calls them.
        key: The argument of AEMIM.
        default: The setting that is the recipe as it is.
        overrides: What each other setting changes.
        paper: What the paper reports of a setting, top-1 in percent.
    """

    title: str
    key: str
    default: str
    overrides: Mapping[str, tuple[str, ...]]
    paper: Mapping[str, float]


def _of(title: str, key: str, default: str, values: Mapping[str, float | None]) -> Group:
    """Settings of one argument of AEMIM, with the paper's numbers where it has them."""
    changed = {value: (f"algorithms.aemim.{key}={value}",) for value in values if value != default}
    known = {value: number for value, number in values.items() if number is not None}
    return Group(title, key, default, changed, known)


GROUPS = {
    "epsilon": _of("(a) budget ε", "epsilon", "2.0", {"1.0": 81.3, "2.0": 81.4, "4.0": 81.2, "8.0": None}),
    "steps": _of("(b) attack steps T", "steps", "2", {"0": None, "1": 81.2, "2": 81.4, "3": 81.4}),
    "adapter": _of(
        "(c) adapter", "adapter", "norm", {"none": 81.2, "cls_token": 81.4, "norm": 81.4, "both": None}
    ),
    "loss": _of(
        "(d) adversarial loss", "adversarial_loss", "l2", {"reconstruction": 81.1, "kl": 81.3, "l2": 81.4}
    ),
    "loss_ratio": _of("Figure 4: λ", "loss_ratio", "0.5", dict.fromkeys(("0.1", "0.3", "0.5", "0.7", "0.9"))),
    "step_size": _of(
        "step size μ", "step_size", "1.25 ε / T", {"1.25 ε / T": None, "2.0": None, "4.0": None}
    ),
    "adversarial_ratio": _of(
        "share α of the batch", "adversarial_ratio", "1.0", {"0.25": None, "0.5": None, "1.0": None}
    ),
}
"""Table 8 (a) to (d), Figure 4, and what the paper leaves open."""


def jobs_of(options: argparse.Namespace, per_epoch: Mapping[Path, int]) -> list[Job]:
    """All runs: the recipe as it is and the baseline once a seed, then the groups in order.

    Args:
        options: The command line.
        per_epoch: Batches of an epoch of each recipe.
    """
    settings: dict[str, tuple[Path, tuple[str, ...]]] = {DEFAULT: (options.recipe, ())}
    if options.baseline:
        settings[BASELINE] = (options.baseline, ())
    for name in options.groups:
        for value, overrides in GROUPS[name].overrides.items():
            settings[f"{name} {value}"] = (options.recipe, overrides)
    return [
        Job(method, recipe, round(options.epochs * per_epoch[recipe]), seed, overrides)
        for seed in options.seeds
        for method, (recipe, overrides) in settings.items()
    ]


def require_default(recipe: Path, baseline: Path | None, overrides: Sequence[str]) -> None:
    """Refuse recipes that are not what the tables call them.

    Raises:
        RecipeError: If an argument of AEMIM is not the default of its group; if the baseline has AEMIM, or
            another model.
    """
    loaded = load_recipe(recipe, overrides)
    if "aemim" not in loaded.algorithms:
        raise RecipeError(f"{recipe}: algorithms: expected aemim among them")
    values = {name: value.default for name, value in inspect.signature(AEMIM).parameters.items()}
    values |= loaded.algorithms["aemim"] or {}
    for name, group in GROUPS.items():
        expected = None if group.key == "step_size" else group.default
        if str(value := values[group.key]) != str(expected):
            raise RecipeError(
                f"{recipe}: algorithms.aemim.{group.key}={value}: expected {expected}, the default of {name}"
            )
    if baseline is None:
        return
    without = load_recipe(baseline, overrides)
    if "aemim" in without.algorithms:
        raise RecipeError(f"--baseline={baseline}: algorithms: expected no aemim among them")
    if without.model != loaded.model:
        raise RecipeError(f"--baseline={baseline}: expected the model of {recipe}")


def table(result: Mapping[str, Any]) -> str:
    """Markdown in the layout of Table 8: a row for each setting, the paper's number last."""
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for run in result["runs"]:
        runs.setdefault(run["method"], []).append(run)
    names = score_names(result)
    heads = ["", "setting", "seeds", "linear probe", *names, "paper, IN-1K"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    rows: list[tuple[str, str, str, float | None]] = [
        ("", name, name, PAPER[name]) for name in (BASELINE, DEFAULT)
    ]
    for key in result["groups"]:
        group = GROUPS[key]
        values = [*group.overrides]
        for value in dict.fromkeys([*group.paper, group.default, *values]):
            method = DEFAULT if value == group.default else f"{key} {value}"
            rows.append((group.title, value, method, group.paper.get(value)))
    for title, value, method, paper in rows:
        if method in runs:
            found = runs[method]
            cells = [title, value, str(len(found)), cell([run["probes"][-1]["linear"] for run in found])]
            cells += [cell([run["scores"][name] for run in found if name in run["scores"]]) for name in names]
            lines.append(f"| {' | '.join([*cells, '–' if paper is None else f'{paper:.1f}'])} |")
    return "\n".join([*lines, "", "Mean ± sample standard deviation over seeds; accuracies in percent."])


def draw_losses(result: Mapping[str, Any], out: Path) -> None:
    """Figure 2: both losses over pre-training, for the attacks on features and on the loss, if run."""
    first = {run["method"]: run for run in reversed(result["runs"])}
    if not all(method in first for method in _FIGURE_2):
        return
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    for axis, (method, title) in zip(figure.subplots(1, 2, sharey=True), _FIGURE_2.items(), strict=True):
        for number, (key, name) in enumerate(_LOSSES.items()):
            points = [(line["batch"], line[key]) for line in first[method]["losses"] if key in line]
            axis.plot(*zip(*points, strict=True), label=name, color=COLOURS[number], linewidth=1)
        axis.set_title(f"attack on the {title}", fontsize=10)
        axis.set_xlabel("batch", fontsize=9)
        axis.legend(fontsize=8, frameon=False)
        axis.grid(alpha=0.3, linewidth=0.6)
    figure.axes[0].set_ylabel("reconstruction loss", fontsize=9)
    save_figure(figure, out)


def draw_loss_ratio(result: Mapping[str, Any], out: Path) -> None:
    """Figure 4: what the fine-tuned classifiers reach over λ, if two values of it were run.

    The baseline is at 1, where AEMIM is what it is without.
    """
    group = GROUPS["loss_ratio"]
    methods = {float(value): f"loss_ratio {value}" for value in group.overrides}
    methods |= {float(group.default): DEFAULT, 1.0: BASELINE}
    curves = dict[str, list[Point]]()
    for name in shown_scores(score_names(result)):
        for ratio in sorted(methods):
            runs = [run for run in result["runs"] if run["method"] == methods[ratio]]
            if runs:
                mean, deviation = mean_and_deviation([run["scores"][name] for run in runs])
                band = (mean - deviation, mean + deviation) if deviation is not None else (None, None)
                curves.setdefault(name, []).append(Point(ratio, mean, *band))
    if not any(run["method"].startswith("loss_ratio") for run in result["runs"]):
        return
    figure, axes = grid(len(curves))
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        draw_curves(axis, {name: points})
        low, high = axis.get_ylim()
        spare = max(0.0, _SPAN - (high - low)) / 2
        axis.set_ylim(low - spare, high + spare)
        axis.set_title(score_title(name), fontsize=10)
        axis.set_xlabel("weight λ of the clean loss (1: without AEMIM)", fontsize=9)
        axis.set_ylabel("top-1 accuracy, %", fontsize=9)
    save_figure(figure, out)


def main(arguments: Sequence[str]) -> int:
    return ended(partial(_main, arguments))


def _main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    result, recipes = environment("benchmarks/ablations.py", arguments), options.recipes
    told = recipes.overrides["pretrain"]
    require_default(options.recipe, options.baseline, told)
    paths = [path for path in (options.recipe, options.baseline) if path is not None]
    jobs = jobs_of(options, {path: batches_per_epoch(path, told) for path in paths})
    for job in jobs:
        check(job, recipes)
    print(f"{len(jobs)} runs", file=sys.stderr, flush=True)
    outcomes, whole = make_runs(jobs, recipes, finished=options.finished)
    if outcomes:
        result |= {"epochs": options.epochs, "groups": options.groups, "overrides": options.overrides}
        result["runs"] = [_without_unused_losses(outcome) for outcome in outcomes]
        write_json(result, options.out)
        draw_losses(result, options.out.with_name(f"{options.out.stem}-losses.png"))
        draw_loss_ratio(result, options.out.with_name(f"{options.out.stem}-loss-ratio.png"))
        print(table(result))
    return 0 if whole else 1


def _without_unused_losses(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """An outcome as it is kept: only Figure 2 is about losses, which are most of the file."""
    drawn = outcome["method"] in _FIGURE_2
    return {key: value for key, value in outcome.items() if drawn or key != "losses"}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; ends with code 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="+", metavar="RECIPE", help="of AEMIM; and key=value overrides")
    parser.add_argument("--baseline", type=Path, help="recipe without AEMIM")
    parser.add_argument("--epochs", type=float, required=True)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS)[:5])
    parser.add_argument("--out", type=Path, default=Path("ablations.json"))
    add_stage_options(parser)
    options = parser.parse_intermixed_args(arguments)
    paths = read_stage_options(parser, options, options.words)
    if len(paths) != 1:
        parser.error(f"got {len(paths)} recipes: expected one")
    (options.recipe,) = paths
    if options.baseline is not None and not options.baseline.is_file():
        parser.error(f"--baseline={options.baseline}: no such file")
    if options.epochs <= 0:
        parser.error(f"--epochs={options.epochs}: expected more than 0")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
