"""How many cores feed one GPU: what it trains in a second over what the loader's workers prepare here.

A GPU's need is measured where `cost.py` has run on one (the best of its micro-batches, bf16), else predicted:
its peak rate times an assumed utilisation over the FLOPs of a step. A core's rate is in processor time of
the loader and all its workers, as many at once as were measured: what shares the machine with them hardly
changes it, but what they take from one another, such as the caches, does.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from image_pipelines import FULL, IMAGE_SIZE, Seconds, shard_pipeline, timed
from prediction import MODELS as MAE_SIZES
from training import METHODS, PLAIN
from turns import ratios, rotated, spread

from aemim_algorithm.models import MAE, MODELS
from aemim_algorithm.recipes.estimate import step_flops

__all__ = ["Need", "deliver", "delivery", "measured_needs", "needs", "report"]

# By name: the key in `MODELS`, how to build it, and the side of its images.
SIZES: dict[str, tuple[str | None, Callable[[], Any], int]] = {
    "ViT-S": ("mae_vit_small_patch16", MODELS["mae_vit_small_patch16"], IMAGE_SIZE),
    "ViT-B": ("mae_vit_base_patch16", MODELS["mae_vit_base_patch16"], IMAGE_SIZE),
    "ViT-L": (None, partial(MAE, image_size=IMAGE_SIZE, **MAE_SIZES["vit_large"]), IMAGE_SIZE),
    "Swin-B": ("simmim_swin_base_patch4_window6", MODELS["simmim_swin_base_patch4_window6"], 192),
}
COMPARED = (PLAIN, "Fast AEMIM", "AEMIM")

Epoch = Callable[[], Iterator[int]]


@dataclass(frozen=True)
class Need:
    """Images that one GPU trains in a second.

    Attributes:
        model: Key of ``SIZES``.
        method: Key of ``METHODS``.
        images_per_second: The need.
        measured: Whether it was measured; else it is predicted.
    """

    model: str
    method: str
    images_per_second: float
    measured: bool


def needs(cost: Path | None, *, flops: float, utilization: float) -> list[Need]:
    """What a GPU needs for each model and method.

    Args:
        cost: Result of `cost.py` on a GPU; nothing is measured if it is not there or not to be read.
        flops: FLOP/s of the GPU that predictions are for.
        utilization: Share of them that training reaches.
    """
    measured = measured_needs(cost)
    found = []
    for name, (key, build, side) in SIZES.items():
        with torch.device("meta"):
            model = build()
            batch = (torch.empty(2, 3, side, side), torch.empty(2, dtype=torch.int64))
        for method in COMPARED:
            if (key, method) in measured:
                found.append(Need(name, method, measured[key, method], measured=True))
                continue
            work = step_flops(model, batch, METHODS[method]()) / len(batch[1])
            found.append(Need(name, method, flops * utilization / work, measured=False))
    return found


def measured_needs(cost: Path | None) -> dict[tuple[str | None, str], float]:
    """Images/s by key of ``MODELS`` and method, of a result of `cost.py`; empty if it cannot be read."""
    try:
        result = json.loads(cost.read_text(encoding="utf-8")) if cost else {}
        rows = [row for row in result["measured"] if row["precision"] == "bf16" and "seconds" in row]
        best: dict[tuple[str | None, str], float] = {}
        for row in rows:
            rate = row["micro_batch"] / statistics.median(row["seconds"])
            place = (row["model"], row["method"])
            best[place] = max(rate, best.get(place, 0.0))
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError):
        return {}
    return best


def deliver(
    shards: Mapping[str, Path], workers: Sequence[int], *, images: int, batch: int, seed: int, rounds: int
) -> dict[str, dict[str, Seconds]]:
    """Run the loaders of some shards with some numbers of workers.

    Args:
        shards: By name.
        workers: Numbers of workers.
        images: How many the shards hold.
        batch: Images of a batch at most; less where an epoch would not be four batches of each worker.
        seed: Of order and crops.
        rounds: Timed epochs of each.

    Returns:
        Of each kind of shards and number of workers the seconds per image, as :func:`delivery` has them.
    """
    size = max(1, min(batch, images // (4 * max(workers))))
    epochs: dict[str, dict[int, Epoch]] = {
        name: {
            count: partial(shard_pipeline(place, size, seed, workers=count).run, "batches")
            for count in workers
        }
        for name, place in shards.items()
    }
    return delivery(epochs, rounds)


def delivery(epochs: Mapping[str, Mapping[int, Epoch]], rounds: int) -> dict[str, dict[str, Seconds]]:
    """Time epochs in turns; a first round does not count.

    Args:
        epochs: By kind and number of workers, what starts one.
        rounds: Timed epochs of each.

    Returns:
        ``"cpu"``, of all processes together, and ``"wall"``, seconds per image, one value a round.
    """
    places = [(kind, workers) for kind, by_workers in epochs.items() for workers in by_workers]
    seconds: dict[str, dict[str, Seconds]] = {
        kind: {str(workers): {"cpu": [], "wall": []} for workers in epochs[kind]} for kind in epochs
    }
    names = {f"{kind} {workers}": (kind, workers) for kind, workers in places}
    for round_number in range(rounds + 1):
        for name in rotated([*names], round_number):
            kind, workers = names[name]
            for clock, value in timed(epochs[kind][workers](), skip=workers).items():
                if round_number:
                    seconds[kind][str(workers)][clock].append(value)
    return seconds


def report(
    feeding: Mapping[str, Any], normalising: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> str:
    """Markdown: rates by workers, cores by model and method, and what helps a loader that is the limit.

    Args:
        feeding: What the result file has of it.
        normalising: Of each kind of shards the seconds per image without and with normalisation on the core.
    """
    seconds = feeding["seconds_per_image"]
    lines = [
        "| loader | workers | images/s | × 1 worker | images per core second |",
        "|---|---|---|---|---|",
    ]
    for kind, by_workers in seconds.items():
        first = next(iter(by_workers.values()))["wall"]
        for workers, clocks in by_workers.items():
            scaled = spread(ratios(first, clocks["wall"]))
            rates = [spread([1 / value for value in clocks[clock]], 0) for clock in ("wall", "cpu")]
            lines.append(f"| {kind} | {workers} | {rates[0]} | {scaled} | {rates[1]} |")
    rates_of_core = {kind: rate_of_core(by_workers) for kind, by_workers in seconds.items()}
    heads = " | ".join(f"cores, {kind}" for kind in rates_of_core)
    lines += [
        f"\nCores that feed {feeding['device']}:\n",
        f"| model | method | images/s | source | {heads} |",
        "|---|---|---|---|" + "---|" * len(rates_of_core),
    ]
    for need in feeding["needs"]:
        cores = " | ".join(f"{need['images_per_second'] / rate:.1f}" for rate in rates_of_core.values())
        source = "measured" if need["measured"] else "predicted"
        start = f"| {need['model']} | {need['method']} | {need['images_per_second']:.0f} | {source}"
        lines.append(f"{start} | {cores} |")
    return "\n".join([*lines, "\nWhere the loader is the limit:\n", *remedies(feeding, normalising)])


def rate_of_core(by_workers: Mapping[str, Seconds]) -> float:
    """Images per second of processor time, at the most workers that were measured."""
    most = max(by_workers, key=int)
    return 1 / statistics.median(by_workers[most]["cpu"])


def remedies(
    feeding: Mapping[str, Any], normalising: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> list[str]:
    """What each of the things that one can do is worth."""
    seconds = feeding["seconds_per_image"]
    most = max(seconds[FULL], key=int)
    full = seconds[FULL][most]["wall"]
    lines = [
        f"- {kind}, {most} workers: {spread(ratios(full, by_workers[most]['wall']))} times {FULL}"
        for kind, by_workers in seconds.items()
        if kind != FULL
    ]
    for kind, (without, with_it) in normalising.items():
        gain = spread(ratios(with_it, without))
        lines.append(f"- normalisation on the device, as ours does it, not on a core ({kind}): {gain} times")
    scaled = feeding["scaled_decoding"]
    lines.append(
        f"- JPEGs decoded at half size where the crop is large enough, {scaled['share']:.0%} of them: "
        f"{spread(scaled['ratios'])} times"
    )
    return lines
