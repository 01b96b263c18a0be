"""Who may use which cores and GPUs now: studies that overlap wait for one another.

Each core that this process may run on, with the other threads of the same core, and each GPU that it sees has
a lock file. Two studies that `taskset`, and on GPUs `CUDA_VISIBLE_DEVICES` as well, keep apart run side by
side; all others one after the other.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import torch

__all__ = ["devices", "reserved"]


_FOLDER = "/tmp/aemim-benchmarks"  # not $TMPDIR, which may differ between processes
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def devices() -> list[str]:
    """Names of the cores and GPUs of this process, in an order that is the same for all processes."""
    numbers = {number for own in os.sched_getaffinity(0) for number in _siblings(own)}
    cores = [f"core {number}" for number in sorted(numbers)]
    gpus = [
        f"GPU {torch.cuda.get_device_properties(number).uuid}" for number in range(torch.cuda.device_count())
    ]
    return [*cores, *sorted(gpus)]


@contextmanager
def reserved(names: list[str] | None = None, folder: Path | None = None) -> Iterator[None]:
    """Hold cores and GPUs; waits, and says so, while another benchmark holds one of them.

    A process that is killed holds nothing: the kernel drops its locks.

    Args:
        names: What to hold; ``None``: :func:`devices`.
        folder: Of the lock files; ``None``: the environment's ``AEMIM_LOCKS``, or else the machine's own.
    """
    folder = folder or Path(os.environ.get("AEMIM_LOCKS", _FOLDER))
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        for name in devices() if names is None else names:
            file = held.enter_context(open(folder / f"{name.replace(' ', '-')}.lock", "a+b"))
            _lock(file, name)
            file.truncate(0)
            file.write(str(os.getpid()).encode())
            file.flush()
        yield


def _siblings(core: int) -> set[int]:
    """The logical cores that share one core's arithmetic, itself among them."""
    file = Path(_SIBLINGS.format(core))
    if not file.exists():
        return {core}
    found: set[int] = set()
    for part in file.read_text().strip().split(","):  # "0,64" or "0-1"
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _lock(file: IO[bytes], name: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().decode() or "?"
        print(
            f"{name} is in use by another benchmark (process {holder}): waiting", file=sys.stderr, flush=True
        )
        fcntl.flock(file, fcntl.LOCK_EX)
