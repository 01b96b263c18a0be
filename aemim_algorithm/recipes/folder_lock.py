"""One run at a time in a folder: two would cut each other's history and remove each other's checkpoints."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aemim_algorithm.first_rank import on_first_rank

__all__ = ["hold_save_folder"]

_LOCK = ".in_use"


@contextmanager
def hold_save_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a save folder, which the system takes back however the process ends.

    The first rank holds it for all. It is a lock of the process, which loader processes do not inherit: a run
    that was killed can be started again while they still end. Where the file system has no locks, nothing is
    refused.

    Args:
        folder: The run's save folder, the same for all ranks; made if it is not there.

    Raises:
        ValueError: Another run is at work in the folder, or it cannot be written; on every rank.
    """
    handles: list[int] = []
    try:
        on_first_rank(lambda: _take(folder, handles))
        yield
    finally:
        for handle in handles:
            os.close(handle)


def _take(folder: Path, handles: list[int]) -> None:
    """Open the lock's file, which goes into the list, and take the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handles.append(os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666))
        _lock(folder, handles[0])
    except OSError as reason:
        raise ValueError(f"save_folder={folder}: cannot be written ({reason})") from reason


def _lock(folder: Path, handle: int) -> None:
    """Take the lock, and say who has it; or refuse, naming who has."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as taken:  # which of the two depends on the file system
        holder = os.pread(handle, 1000, 0).decode(errors="replace").strip() or "a process"
        raise ValueError(
            f"save_folder={folder}: {holder} is at work on the run in it; wait for its end, or choose "
            "another run_name"
        ) from taken
    except OSError:  # a file system without locks
        return
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
