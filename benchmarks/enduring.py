"""Contenders some of which need more memory than there is: those are left out, the others are measured."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import psutil
import torch
from turns import Make, Step, measure, synchronize

__all__ = ["FAILED", "endured", "measure_enduring", "present_memory"]

FAILED = "failed"
_SHORT, _RETRIES, _BUILT = "short_of_memory", "allocation_retries", "built_memory_bytes"

Measured = dict[str, dict[str, Any]]


def measure_enduring(contenders: Mapping[str, Make], *, rounds: int, device: str, threads: int) -> Measured:
    """Time the contenders in turns; a second time, and alone, those that found too little memory.

    On a GPU contenders hold memory while others have their turn, so that one which needs most of it may do
    so only alone.

    Args:
        contenders: By name.
        rounds: Timed steps of each.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads of each.

    Returns:
        For each contender ``seconds``, one entry a round, ``peak_memory_bytes``, ``built_memory_bytes`` (what
        its process held before the first step) and ``alone``, whether it was measured alone; or ``failed``:
        ``"out of memory"`` or ``"died"``.
    """
    run = partial(_measure, rounds=rounds, device=device, threads=threads)
    measured = run(contenders)
    for name, row in measured.items():
        if len(contenders) > 1 and (FAILED in row or row[_RETRIES]):
            measured[name] = run({name: contenders[name]})[name] | {"alone": True}
    for row in measured.values():
        row.pop(_RETRIES, None)
    return measured


def endured(make: Make, device: str) -> Step:
    """A contender's step that says so when memory ends, and does nothing from then on."""
    run = _unless_short(make)
    built = float(present_memory(device))

    def step() -> Mapping[str, float]:
        nonlocal run
        if run is not None and _unless_short(partial(_finished, run, device)) is None:
            run = None
            _release(device)
        if run is None:
            return {_SHORT: 1.0}
        return {_SHORT: 0.0, _RETRIES: _allocation_retries(device), _BUILT: built}

    return step


def present_memory(device: str) -> int:
    """Bytes that are held now: CUDA's allocated ones, or the process's resident set."""
    if device == "cuda":
        return int(torch.cuda.memory_allocated())
    return int(psutil.Process().memory_info().rss)


def _measure(contenders: Mapping[str, Make], *, rounds: int, device: str, threads: int) -> Measured:
    makers = {name: partial(endured, make, device) for name, make in contenders.items()}
    try:
        measured = measure(makers, rounds=rounds, device=device, threads=threads)
    except SystemExit as death:  # killed: a CPU process cannot see it coming
        if not isinstance(death.code, str):
            raise  # this process is to end: Composer makes SIGTERM an exit with a number
        print(death, file=sys.stderr)
        return {name: {FAILED: "died"} for name in contenders}
    return {name: _row(row) for name, row in measured.items()}


def _row(measured: Mapping[str, Any]) -> dict[str, Any]:
    last = measured["parts"][-1]
    if last[_SHORT]:
        return {FAILED: "out of memory"}
    return {
        "seconds": measured["seconds"],
        "peak_memory_bytes": measured["peak_memory_bytes"],
        _BUILT: int(last[_BUILT]),
        _RETRIES: last[_RETRIES],
        "alone": False,
    }


def _finished(run: Step, device: str) -> bool:
    run()
    synchronize(device)  # on a GPU errors come late
    return True


def _unless_short(function: Callable[[], Any]) -> Any:
    """What a function returns, or ``None`` if it ran out of memory."""
    try:
        return function()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        print(str(error).partition("\n")[0], file=sys.stderr)
        return None


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _allocation_retries(device: str) -> float:
    """How often memory that was set aside had to be given back to find a piece that is large enough."""
    return float(torch.cuda.memory_stats().get("num_alloc_retries", 0)) if device == "cuda" else 0.0
