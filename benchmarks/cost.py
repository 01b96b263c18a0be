"""What AEMIM costs: time, memory and FLOPs of a training step, by method, model, precision and micro-batch.

    python benchmarks/cost.py --models mae_vit_base_patch16 simmim_swin_base_patch4_window6 --micro-batch 8 16

The methods take turns (`turns.py`). A step is forward, loss, backward and AdamW on one micro-batch of random
pixels in memory; `end_to_end.py` is through the Trainer, from shards. What runs out of memory is recorded as
such, and the rest goes on; the result file grows with every combination.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from breakdown import breakdowns
from cost_tables import tables
from enduring import FAILED, measure_enduring
from flops import bound_flops, counted_flops
from overhead import overhead
from record import environment, write_json
from training import BARE, BATCH_MULTIPLE, METHODS, PLAIN, Settings, Training
from turns import Step

from aemim_algorithm.models import MODELS

_EXTRAS = ("breakdown", "overhead")


def training_step(method: str, settings: Settings) -> Step:
    """A method's training step."""
    return Training(method, settings).step


def sweep(settings: Settings, methods: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Measure the methods on one model, precision and micro-batch.

    Returns:
        A row for each.
    """
    print(
        f"{settings.model} {settings.precision} {settings.micro_batch}: {', '.join(methods)}", file=sys.stderr
    )
    makers = {method: partial(training_step, method, settings) for method in methods}
    measured = measure_enduring(makers, rounds=repeats, device=settings.device, threads=settings.threads)
    place = {name: getattr(settings, name) for name in ("model", "precision", "micro_batch")}
    return [place | {"method": method} | row for method, row in measured.items()]


def flops_of_methods(settings: Settings, methods: Sequence[str]) -> dict[str, dict[str, float]]:
    """FLOPs per image of each method, counted as they run, and the least that it can do with."""
    # They are proportional to the batch, and the same on every device: count the smallest batch that every
    # method can take, where it takes no memory from what is measured.
    smallest = replace(settings, micro_batch=BATCH_MULTIPLE, precision="fp32", device="cpu")
    return {"counted": counted_flops(smallest, methods), "bound": bound_flops(smallest, methods)}


def measure_all(
    options: argparse.Namespace, result: dict[str, Any], combinations: Sequence[Settings]
) -> None:
    """Fill a result: all that the options ask for, and write it as it grows."""
    for settings in combinations:
        methods = methods_for(settings.model, options)
        rows = sweep(settings, methods, options.repeats)
        result["measured"] += rows
        write_json(result, options.out)
        if settings.model not in result["flops_per_image"]:
            ran = [row["method"] for row in rows if FAILED not in row]
            result["flops_per_image"][settings.model] = flops_of_methods(settings, ran)
    for settings in combinations if "breakdown" not in options.skip else ():
        survivors = [name for name in surviving(result, settings) if name not in BARE]
        if survivors and is_largest(settings, result):
            parts = breakdowns(survivors, settings, steps=1 if settings.device == "cpu" else 3)
            result["breakdown"].append(asdict(settings) | {"seconds": parts})
            write_json(result, options.out)
    for settings in combinations if "overhead" not in options.skip else ():
        if settings.micro_batch == min(options.micro_batch):  # where it weighs most
            compared = [name for name in BARE.values() if name in surviving(result, settings)]
            result["overhead"] += overhead(settings, compared, result["measured"])
            write_json(result, options.out)


def surviving(result: dict[str, Any], settings: Settings) -> list[str]:
    """Methods that had memory enough for a combination."""
    return [row["method"] for row in rows_of(result, settings) if FAILED not in row]


def rows_of(result: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """The measured rows of a combination."""
    place = (settings.model, settings.precision, settings.micro_batch)
    return [
        row for row in result["measured"] if (row["model"], row["precision"], row["micro_batch"]) == place
    ]


def is_largest(settings: Settings, result: dict[str, Any]) -> bool:
    """Whether no larger micro-batch of the model and precision went through without a failure."""
    sizes = {
        row["micro_batch"]
        for row in result["measured"]
        if (row["model"], row["precision"]) == (settings.model, settings.precision)
    }
    whole = [
        size
        for size in sizes
        if all(FAILED not in row for row in rows_of(result, replace(settings, micro_batch=size)))
    ]
    return settings.micro_batch == max(whole or sizes)


def methods_for(model: str, options: argparse.Namespace) -> list[str]:
    """The methods to measure on a model: those asked for, or what the paper has on it."""
    if options.methods:
        return [*dict.fromkeys([PLAIN, *options.methods])]
    if not model.startswith("mae_"):
        return [PLAIN, "AEMIM T=1", "AEMIM"]  # Table 9 has T=1
    if options.device == "cpu":
        return [PLAIN, "Fast AEMIM", "AEMIM", "AEMIM, separate", "AEMIM, early layer"]
    return [*METHODS, *BARE]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; ends with code 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description="Step time, memory and FLOPs of AEMIM.")
    on_gpu = torch.cuda.is_available()
    known = sorted(name for name in MODELS if name.startswith(("mae_", "simmim_")))
    parser.add_argument("--models", nargs="+", default=["mae_vit_base_patch16"], choices=known)
    parser.add_argument(
        "--micro-batch", nargs="+", type=int, help="images of a step; default 16, or 64 to 512"
    )
    parser.add_argument(
        "--precision", nargs="+", choices=["fp32", "bf16"], help="default fp32, on a GPU bf16"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=[*METHODS, *BARE], help=f"beside {PLAIN!r}; default by model"
    )
    parser.add_argument("--repeats", type=int, help="timed steps of each method; default 3, on a GPU 10")
    parser.add_argument("--skip", nargs="+", default=[], choices=_EXTRAS, help="what not to measure")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default benchmarks/results/cost-DEVICE.json")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not on_gpu:
        parser.error("--device=cuda: expected cpu, as torch finds no GPU here")
    _fill_in(options)
    for size in options.micro_batch:
        if size < 1 or size % BATCH_MULTIPLE:
            parser.error(f"--micro-batch={size}: expected a multiple of {BATCH_MULTIPLE}")
    for name in ("repeats", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)}: expected at least 1")
    return options


def _fill_in(options: argparse.Namespace) -> None:
    """Defaults that depend on the device: about six minutes on two cores, five on a data centre's GPU."""
    cpu = options.device == "cpu"
    options.micro_batch = options.micro_batch or ([16] if cpu else [64, 128, 256, 512])
    options.precision = options.precision or ["fp32" if cpu else "bf16"]
    options.repeats = (3 if cpu else 10) if options.repeats is None else options.repeats
    options.out = options.out or Path(__file__).parent / "results" / f"cost-{options.device}.json"


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    result = environment("benchmarks/cost.py", arguments)
    result["settings"] = {
        name: getattr(options, name)
        for name in ("models", "micro_batch", "precision", "repeats", "device", "threads", "seed")
    }
    result |= {"flops_per_image": {}, "measured": [], "breakdown": [], "overhead": []}
    combinations = [
        Settings(model, size, precision, options.device, options.threads, options.seed)
        for model in options.models
        for precision in options.precision
        for size in options.micro_batch
    ]
    measure_all(options, result, combinations)
    write_json(result, options.out)
    print(tables(result))


if __name__ == "__main__":
    main(sys.argv[1:])
