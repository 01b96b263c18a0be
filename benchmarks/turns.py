"""Contenders in processes of their own that take turns: one timed step each a round.

So the peak memory of each is its own, a slow minute of the machine hits all of them, and a ratio taken within
a round compares like with like. Who goes first rotates, so that none always follows the same one.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

__all__ = ["Make", "Step", "measure", "peak_memory", "ratios", "rotated", "spread", "synchronize"]

WARM_UP_STEPS = 2

Step = Callable[[], Mapping[str, float] | None]
"""One training step; what it returns is kept beside its seconds, such as the seconds of its parts."""

Make = Callable[[], Step]
"""Builds a contender inside its process: a function of a module, or a partial of one."""


def measure(
    contenders: Mapping[str, Make], *, rounds: int, device: str, threads: int
) -> dict[str, dict[str, Any]]:
    """Time the contenders in turns.

    Args:
        contenders: By name.
        rounds: Timed steps of each, after two that do not count.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads of each; only one contender runs at a time.

    Returns:
        For each contender ``seconds`` and ``parts``, one entry a round, and ``peak_memory_bytes``.
    """
    measured: dict[str, dict[str, Any]] = {name: {"seconds": [], "parts": []} for name in contenders}
    with _workers(contenders, device, threads) as connections:
        for round_number in range(rounds):
            for name in rotated([*contenders], round_number):
                connections[name].send("step")
                seconds, parts = _receive(connections[name], name)
                measured[name]["seconds"].append(seconds)
                measured[name]["parts"].append(parts)
        for name, connection in connections.items():
            connection.send("end")
            measured[name]["peak_memory_bytes"] = _receive(connection, name)
    return measured


def rotated(names: Sequence[str], round_number: int) -> list[str]:
    """The order of a round."""
    first = round_number % len(names)
    return [*names[first:], *names[:first]]


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Each value over the one of the same round."""
    return [a / b for a, b in zip(values, base, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range, as the tables show them."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str) -> int:
    """Bytes: CUDA's allocated maximum, or the process's peak resident set."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include the process that started this one
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _serve(connection: Connection, make: Make, device: str, threads: int) -> None:
    """A worker: warm up, then one timed step per request; at the end its peak memory."""
    torch.set_num_threads(threads)
    step = make()
    for _ in range(WARM_UP_STEPS):
        step()
    connection.send("ready")
    while connection.recv() == "step":
        synchronize(device)
        start = time.perf_counter()
        parts = step()
        synchronize(device)
        connection.send((time.perf_counter() - start, dict(parts or {})))
    connection.send(peak_memory(device))


@contextmanager
def _workers(contenders: Mapping[str, Make], device: str, threads: int) -> Iterator[dict[str, Connection]]:
    """One warmed-up process for each contender; none is left after an error."""
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    try:
        for name, make in contenders.items():
            connections[name], theirs = context.Pipe()
            # No daemon: those may have no processes of their own, such as a loader's.
            process = context.Process(target=_serve, args=(theirs, make, device, threads))
            process.start()
            theirs.close()  # so that a worker that dies ends our recv with an error
            processes.append(process)
        for name, connection in connections.items():
            _receive(connection, name)
        yield connections
        for process in processes:
            process.join()  # they were asked to end
    finally:
        for process in processes:
            process.kill()  # not terminate: Composer's SIGTERM handler raises in the midst of things
            process.join()


def _receive(connection: Connection, name: str) -> Any:
    """A worker's next message."""
    try:
        return connection.recv()
    except EOFError:
        raise SystemExit(
            f"the {name} process died (see above; out of memory?): try a smaller --micro-batch"
        ) from None
