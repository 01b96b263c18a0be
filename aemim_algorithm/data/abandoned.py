"""Hidden folders of killed conversions, told from those at work by a lock that ends with the process."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["held", "remove_abandoned"]


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Mark a folder as one at work, for as long as the block or the process lasts."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle)  # where a file system has no locks, nothing is ever removed
        yield
    finally:
        os.close(handle)


def remove_abandoned(out: Path) -> None:
    """Remove what killed conversions to ``out`` had not finished.

    Args:
        out: Their target: folders beside it that are called ``.<its name>.<anything>.partial`` are theirs.
    """
    for folder in out.parent.glob(f".{out.name}.*.partial"):
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # another process was first
        try:
            if _lock(handle):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def _lock(handle: int) -> bool:
    """Whether the lock was free, and works."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
