"""Where the time of a training step goes, from one or more steps under torch's profiler.

On a CPU a part takes as long as its scope. On a GPU it takes what the kernels take that were launched inside
its scope, by whichever thread; what the GPU waits for launches is in the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import wraps
from multiprocessing import get_context
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from training import Settings, Training
from turns import synchronize

__all__ = ["PARTS", "breakdown", "breakdowns"]

Range = tuple[float, float]

_STEP, _FORWARD, _LOSS = "step", "step/forward", "step/loss"
_ATTACK, _ADVERSARIAL, _CLEAN_BACKWARD = "aemim/attack", "aemim/adversarial_forward", "aemim/clean_backward"
_SCOPES = {  # the name of a scope, and the part whose time it is
    _FORWARD: "clean forward",
    _ATTACK: "attack",
    _ADVERSARIAL: "adversarial forward",
    _LOSS: "losses",
    _CLEAN_BACKWARD: "backward",
    "step/backward": "backward",
    "step/optimizer": "optimizer",
}
PARTS = (*dict.fromkeys(_SCOPES.values()), "rest")
"""The parts of a step; together they are all of it."""


def breakdowns(methods: Sequence[str], settings: Settings, *, steps: int) -> dict[str, dict[str, float]]:
    """:func:`breakdown` of several methods, each in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        return {method: pool.submit(breakdown, method, settings, steps).result() for method in methods}


def breakdown(method: str, settings: Settings, steps: int) -> dict[str, float]:
    """Profile a method's training step, after one that does not count.

    Args:
        method: Key of ``METHODS``.
        settings: The model and its batch.
        steps: Steps to profile.

    Returns:
        Seconds of a step, ``"step"``, and of each of ``PARTS``, on average.
    """
    torch.set_num_threads(settings.threads)
    training = Training(method, settings)
    training.step()
    synchronize(settings.device)
    with scoped(training.model), profile(activities=_activities(settings.device)) as profiler:
        for _ in range(steps):
            with record_function(_STEP):
                training.step()
                synchronize(settings.device)
    events = profiler.events()
    kernels = None if settings.device == "cpu" else list(launches(events))
    return parts_of(scopes_in(events), kernels)


def parts_of(
    scopes: dict[str, list[Range]], kernels: Sequence[tuple[float, float]] | None = None
) -> dict[str, float]:
    """Share the seconds of the average step out among its parts.

    Args:
        scopes: When each scope was entered and left, in microseconds, by its name.
        kernels: When each of the GPU's kernels was launched, and how long it took; ``None`` for a CPU.

    Returns:
        As :func:`breakdown`.
    """
    steps = scopes[_STEP]
    seconds = dict.fromkeys(("step", *PARTS), 0.0)
    # The attack and the adversarial forward contain passes of the model, which are theirs.
    outer = [inside for name in (_ATTACK, _ADVERSARIAL) for inside in scopes.get(name, [])]
    for name, part in _SCOPES.items():
        ranges = scopes.get(name, [])
        if name in (_FORWARD, _LOSS):
            ranges = [one for one in ranges if not _within(one[0], outer)]
        seconds[part] += sum(
            end - start if kernels is None else _busy(kernels, (start, end)) for start, end in ranges
        )
    seconds["step"] = sum(end - start for start, end in steps)
    seconds["rest"] = seconds["step"] - sum(seconds[part] for part in PARTS if part != "rest")
    return {name: value / 1e6 / len(steps) for name, value in seconds.items()}


def scopes_in(events: Iterable[Any]) -> dict[str, list[Range]]:
    """The ranges of our scopes among a profiler's events, as the CPU has seen them."""
    scopes: dict[str, list[Range]] = {}
    for event in events:
        if event.name in (_STEP, *_SCOPES) and event.device_type == torch.autograd.DeviceType.CPU:
            scopes.setdefault(event.name, []).append((event.time_range.start, event.time_range.end))
    return scopes


def launches(events: Iterable[Any]) -> Iterator[tuple[float, float]]:
    """When each kernel's operator began, and how long the kernel took, in microseconds."""
    for event in events:
        if event.name not in (_STEP, *_SCOPES):  # a scope's own range on the GPU is no kernel
            yield from ((event.time_range.start, kernel.duration) for kernel in event.kernels)


@contextmanager
def scoped(model: Any) -> Iterator[None]:
    """Inside the block each forward pass of the model, and each of its losses, has its own scope."""
    model.forward = _recorded(model.forward, _FORWARD)
    model.loss = _recorded(model.loss, _LOSS)
    try:
        yield
    finally:
        del model.forward, model.loss


def _recorded(function: Callable[..., Any], scope: str) -> Callable[..., Any]:
    @wraps(function)  # AEMIM looks at the signature of `forward`
    def recorded(*args: Any, **kwargs: Any) -> Any:
        with record_function(scope):
            return function(*args, **kwargs)

    return recorded


def _within(moment: float, ranges: Sequence[Range]) -> bool:
    return any(start <= moment < end for start, end in ranges)


def _busy(kernels: Sequence[tuple[float, float]], inside: Range) -> float:
    return sum(duration for launched, duration in kernels if _within(launched, [inside]))


def _activities(device: str) -> list[ProfilerActivity]:
    on_gpu = [ProfilerActivity.CUDA] if device == "cuda" else []
    return [ProfilerActivity.CPU, *on_gpu]
