"""One run at a time in a folder: two would cut each other's history and remove each other's checkpoints."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from composer.utils import dist

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
    handle, refusal = None, [""]
    if dist.get_global_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            refusal = [_refusal(folder, handle)]
        except OSError as reason:  # the others wait for an answer
            refusal = [f"save_folder={folder}: cannot be written ({reason})"]
    try:
        dist.broadcast_object_list(refusal, src=0)
        if refusal[0]:
            raise ValueError(refusal[0])
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _refusal(folder: Path, handle: int) -> str:
    """Take the lock; nothing, or who has it."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of the two depends on the file system
        holder = os.pread(handle, 1000, 0).decode(errors="replace").strip() or "a process"
        return (
            f"save_folder={folder}: {holder} is at work on the run in it; wait for its end, or choose "
            "another run_name"
        )
    except OSError:  # a file system without locks
        return ""
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return ""
