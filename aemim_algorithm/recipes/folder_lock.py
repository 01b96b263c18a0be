"""One run at a time in a folder: two would cut each other's history and remove each other's checkpoints."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aemim_algorithm.first_rank import on_first_rank

__all__ = ["hold_save_folder"]

_LOCK = ".at_work"


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
    lock = _Lock(folder)
    try:
        on_first_rank(lock.take)
        yield
    finally:
        lock.leave()


class _Lock:
    """The file in the folder, and what had to be made for it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / _LOCK
        self.handle: int | None = None
        self.made: list[Path] = []

    def take(self) -> None:
        """Take the lock, and say who has it; or refuse, naming who has."""
        self.made = [place for place in (self.folder, *self.folder.parents) if not place.exists()]
        try:
            while self.handle is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._open()
        except OSError as reason:
            raise ValueError(f"save_folder={self.folder}: cannot be written ({reason})") from reason

    def _open(self) -> None:
        handle = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as taken:  # which of the two depends on the file system
            holder = os.pread(handle, 1000, 0).decode(errors="replace").strip() or "a process"
            os.close(handle)
            raise ValueError(
                f"save_folder={self.folder}: {holder} is at work on the run in it; wait for its end, or "
                "choose another run_name"
            ) from taken
        except OSError:  # a file system without locks
            pass
        if not os.fstat(handle).st_nlink:  # whoever had it has just removed it
            os.close(handle)
            return
        self.handle = handle
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def leave(self) -> None:
        """Give the lock back, and leave no empty folder where there was none."""
        if self.handle is None:
            return
        self.file.unlink(missing_ok=True)
        os.close(self.handle)
        with contextlib.suppress(OSError):  # not empty
            for place in self.made:
                place.rmdir()
