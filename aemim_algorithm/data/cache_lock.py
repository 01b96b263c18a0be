"""Who may use a cache: any number of runs without a limit, or one run with it.

A run with a limit counts the shards that it knows of, and removes them: those of another run would be gone
while that one reads them. So every run holds a lock on a file in its cache, which the system takes back
when the last of its processes ends, also after `kill -9`. The first process of each machine holds it, and
its loader processes with it. Machines that share a cache hold one each, as each counts for itself; where
their file system has no locks between machines, nothing is refused.
"""

from __future__ import annotations

import fcntl
import gc
import os
import re
import time
from pathlib import Path

from aemim_algorithm.data.failures import ShardError

__all__ = ["hold_cache"]

_LOCK = ".in_use"
_PATIENCE = 10.0  # seconds; the loader processes of a killed run go after five
_POLL = 0.05  # seconds
# A file that is still arriving, as `remote.ShardStream`, streaming and boto3 call it.
_PARTIAL = re.compile(r".+\.[0-9a-f]{32}\.partial(\..+)?|(index\.json|shard\..*)\.(tmp|[0-9a-fA-F]{8})")


def hold_cache(folder: Path, *, alone: bool) -> int | None:
    """Take the lock of a cache, and remove what killed runs fetched in part if nobody else has it.

    Args:
        folder: The cache; made if it is not there.
        alone: Whether no other run may use it, as for one with a limit.

    Returns:
        The open file, to be closed after the run; None where none can be written.

    Raises:
        ShardError: Another run uses the cache, and one of the two has a limit.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # nothing can be fetched into it either
        return None
    if _taken(handle, folder, alone):
        return handle
    gc.collect()  # it may be a data set of this process that nobody needs any more
    deadline = time.monotonic() + _PATIENCE
    while not _taken(handle, folder, alone):
        if time.monotonic() > deadline:
            os.close(handle)
            raise ShardError(_refusal(folder, alone))
        time.sleep(_POLL)
    return handle


def _taken(handle: int, folder: Path, alone: bool) -> bool:
    try:
        if _lock(handle, fcntl.LOCK_EX):
            _remove_partial(folder)
            return alone or _lock(handle, fcntl.LOCK_SH)
        return not alone and _lock(handle, fcntl.LOCK_SH)
    except OSError:  # a file system without locks
        return True


def _lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_partial(folder: Path) -> None:
    for path in folder.rglob("*"):
        if _PARTIAL.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _refusal(folder: Path, alone: bool) -> str:
    if alone:
        return (
            f"{folder}: the cache is used by another run, or by another machine of this one, whose shards a "
            "cache_limit would remove: give each its own data.cache, or no data.cache_limit to any"
        )
    return (
        f"{folder}: the cache is used by a run with a cache_limit, which removes shards: give each its own "
        "data.cache, or wait for that run to end"
    )
