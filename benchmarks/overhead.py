"""What a step of AEMIM takes beyond its passes, beside the same passes by hand.

The difference is a few milliseconds of a step of seconds, less than what the noise of a machine lets be seen.
So the model is made as narrow as it goes, with all its layers, the same images and the same micro-batch. What
Python does for each layer and what is done for each pixel (noise, bounds, metrics) stays; the passes all but
vanish.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from enduring import FAILED
from training import BARE, Settings, Training
from turns import Step, measure

__all__ = ["ROUNDS", "narrow", "overhead"]

_NARROW: dict[str, dict[str, Any]] = {
    "mae_": {"embed_dim": 16, "num_heads": 1, "decoder_dim": 16, "decoder_heads": 1},
    "simmim_vit_": {"embed_dim": 16, "num_heads": 1},
    "simmim_swin_": {"embed_dim": 16, "num_heads": (1, 1, 1, 1)},
}
ROUNDS = 20


def overhead(
    settings: Settings, methods: Sequence[str], measured: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Seconds of each method's step beyond its passes.

    Args:
        settings: The model, with its real width, and the micro-batch.
        methods: Of those that `bare.py` can do by hand.
        measured: Rows of the sweep, for the seconds of a real step.

    Returns:
        For each method ``seconds``, one entry a round: step minus bare step of the narrow model; and
        ``share``, their median over the median of the real step.
    """
    rows = []
    for bare, method in BARE.items():
        if method not in methods:
            continue
        seconds = _differences(method, bare, narrow(settings))
        step = statistics.median(_seconds_of(method, settings, measured))
        place = {name: getattr(settings, name) for name in ("model", "precision", "micro_batch")}
        share = statistics.median(seconds) / step
        rows.append(place | {"method": method, "seconds": seconds, "share": share})
    return rows


def narrow(settings: Settings) -> Settings:
    """The same model with all its layers, as narrow as it can be built."""
    options = next(sizes for prefix, sizes in _NARROW.items() if settings.model.startswith(prefix))
    return replace(settings, options={**settings.options, **options})


def _differences(method: str, bare: str, settings: Settings) -> list[float]:
    makers = {name: partial(_step, name, settings) for name in (method, bare)}
    measured = measure(makers, rounds=ROUNDS, device=settings.device, threads=settings.threads)
    pairs = zip(measured[method]["seconds"], measured[bare]["seconds"], strict=True)
    return [whole - passes for whole, passes in pairs]


def _step(method: str, settings: Settings) -> Step:
    return Training(method, settings).step


def _seconds_of(method: str, settings: Settings, measured: Sequence[Mapping[str, Any]]) -> Sequence[float]:
    return next(
        row["seconds"]
        for row in measured
        if FAILED not in row
        and all(row[name] == getattr(settings, name) for name in ("model", "precision", "micro_batch"))
        and row["method"] == method
    )
