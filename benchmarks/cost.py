"""What AEMIM costs: step time, peak memory and FLOPs of MAE, AEMIM and Fast AEMIM.

    python benchmarks/cost.py --model mae_vit_base_patch16 --micro-batch 24 --precision fp32

The methods take turns (`turns.py`). A step is forward, loss, backward and AdamW on one micro-batch of random
pixels.
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
from record import environment, write_json
from training import BATCH_MULTIPLE, METHODS, Settings, Training, bound_flops, counted_flops
from turns import Make, Step, measure, ratios, spread

from aemim_algorithm.models import MODELS


def contenders(settings: Settings) -> dict[str, Make]:
    """What builds each method, in a process of its own."""
    return {method: partial(training_step, method, settings) for method in METHODS}


def training_step(method: str, settings: Settings) -> Step:
    """A method's training step."""
    return Training(method, settings).step


def table(measured: dict[str, dict[str, dict[str, Any]]], flops: dict[str, Any]) -> str:
    """Markdown: a row for each precision and method."""
    lines = [
        "| precision | method | step, s | × MAE | FLOPs × MAE | bound | peak memory, GiB | × MAE |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for precision, by_method in measured.items():
        base = by_method["MAE"]
        for method, row in by_method.items():
            cells = [
                precision,
                method,
                spread(row["seconds"]),
                spread(ratios(row["seconds"], base["seconds"])),
                f"{flops['counted'][method] / flops['counted']['MAE']:.3f}",
                f"{flops['bound'][method] / flops['bound']['MAE']:.3f}",
                f"{row['peak_memory_bytes'] / 2**30:.2f}",
                f"{row['peak_memory_bytes'] / base['peak_memory_bytes']:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    naive = flops["bound"]["naive"] / flops["bound"]["MAE"]
    lines.append(f"\nMedian (min–max). Naive AEMIM, with an extra clean encoder pass: {naive:.3f}.")
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; ends with code 2 if it makes no sense."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="Step time, memory and FLOPs of AEMIM.")
    parser.add_argument(
        "--model",
        default="mae_vit_base_patch16",
        choices=sorted(name for name in MODELS if name.startswith("mae_")),
    )
    parser.add_argument("--micro-batch", type=int, default=256 if device == "cuda" else 24)
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each method")
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    default_out = Path(__file__).parent / "results" / f"cost-{device}.json"
    parser.add_argument("--out", type=Path, default=default_out)
    options = parser.parse_args(arguments)
    if options.micro_batch < 1 or options.micro_batch % BATCH_MULTIPLE:
        parser.error(f"--micro-batch={options.micro_batch}: expected a multiple of {BATCH_MULTIPLE}")
    for name in ("repeats", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)}: expected at least 1")
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    result = environment("benchmarks/cost.py", arguments)
    settings = Settings(
        model=options.model,
        micro_batch=options.micro_batch,
        precision="fp32",
        device=options.device,
        threads=options.threads,
        seed=options.seed,
    )
    # FLOPs are proportional to the batch: count the smallest that every method can take.
    smallest = replace(settings, micro_batch=BATCH_MULTIPLE)
    flops = {"counted": counted_flops(smallest), "bound": bound_flops(smallest)}
    measured = {
        precision: measure(
            contenders(replace(settings, precision=precision)),
            rounds=options.repeats,
            device=options.device,
            threads=options.threads,
        )
        for precision in options.precision
    }
    result |= {"settings": asdict(settings) | {"precision": options.precision}}
    result |= {"flops_per_image": flops, "measured": measured}
    write_json(result, options.out)
    print(table(measured, flops))


if __name__ == "__main__":
    main(sys.argv[1:])
