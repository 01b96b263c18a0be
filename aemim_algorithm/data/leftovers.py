"""What killed runs leave on a machine: shared memory and lock files of streaming.

Streaming numbers its data sets (`000000_locals`, `000000_barrier`, ... in `/dev/shm`, and lock files in the
folder for temporary files), and gives a number up only where nothing of it is left. After `kill -9` all of it
is left, and a run that streams into the same cache may refuse to start. `clean_stale_shared_memory` of
streaming removes the memory of living runs as well, and stops at the first number that is free.

What no process of this machine has open is of a dead run. A run in another container that shares `/dev/shm`
is seen by its lease: a lock on its memory, which ends with its last process. Where there is no `/proc`, as on
macOS, nothing is removed.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir

import torch
from composer.utils import dist
from filelock import FileLock, Timeout
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, SHM_TO_CLEAN

__all__ = ["FAILURE", "clean_leftovers", "numbering", "take_lease"]

FAILURE = "failure"  # last part of the name of the memory that `failures.FailsAloud` adds
_MEMORY = Path("/dev/shm")
_PROCESSES = Path("/proc")
_WAIT = 60.0  # seconds for another run that starts
_NAME = re.compile(rf"(\d{{6,}})_(?:{'|'.join([*SHM_TO_CLEAN, FAILURE, BARRIER_FILELOCK, CACHE_FILELOCK])})")


def clean_leftovers() -> list[str]:
    """Remove shared memory and lock files of this user's dead runs.

    Returns:
        The names of what was removed.
    """
    if not (_PROCESSES / "self" / "maps").exists() or not _MEMORY.is_dir():
        return []
    dead: list[list[Path]] = []
    with suppress(Timeout), _machine_lock():  # a run that hangs does not stop others
        # Listed first: what a run creates after this is not touched, whatever number it takes.
        found = _numbered()
        living = _open_names()
        dead = [files for files in found.values() if not _is_alive(files, living)]
        for file in (file for files in dead for file in files):
            file.unlink(missing_ok=True)
    return [file.name for files in dead for file in files]


@contextmanager
def numbering() -> Iterator[None]:
    """Let the ranks of one run choose the number of their data set together.

    Each looks for the first free one by itself. Were another run of this machine to take or give up one
    meanwhile, they would disagree, and streaming would end with an internal error. All ranks must call this.
    """
    lock, leads = _machine_lock(), dist.get_local_rank() == 0
    if leads:
        with suppress(Timeout):  # a run that hangs does not stop others
            lock.acquire()
    if torch.distributed.is_initialized():
        dist.barrier()
    try:
        yield
    finally:
        lock.release()


def _machine_lock() -> FileLock:
    return FileLock(Path(gettempdir(), f"aemim_numbers_{os.getuid()}.lock"), timeout=_WAIT)


def take_lease(name: str) -> int | None:
    """Mark shared memory as in use, for as long as this process or one forked from it lives.

    Args:
        name: Of the memory.

    Returns:
        The open file, or None where shared memory is no file.
    """
    try:
        file = os.open(_MEMORY / name, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def _numbered() -> dict[str, list[Path]]:
    """This user's files by number; lock files last, as streaming takes no number that has one."""
    found: dict[str, list[Path]] = defaultdict(list)
    for folder in (_MEMORY, Path(gettempdir())):
        for entry in os.scandir(folder):
            match = _NAME.fullmatch(entry.name)
            if match and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                found[match[1]].append(Path(entry.path))
    return found


def _is_alive(files: list[Path], living: set[str]) -> bool:
    return any(file.name in living or _is_leased(file) for file in files)


def _is_leased(file: Path) -> bool:
    if not file.name.endswith(f"_{FAILURE}"):
        return False
    try:
        with file.open("rb") as memory:
            fcntl.flock(memory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # somebody has it, or it cannot be known
        return True
    return False


def _open_names() -> set[str]:
    """Names of the shared memory that some process has open or mapped."""
    names: set[str] = set()
    for process in _PROCESSES.iterdir():
        if not process.name.isdigit():
            continue
        try:
            lines = (process / "maps").read_text(errors="replace").splitlines()
            names |= {Path(line.rpartition(" ")[2]).name for line in lines if f" {_MEMORY}/" in line}
            # From the very moment of its creation, some microseconds before it is mapped.
            links = (os.readlink(link) for link in (process / "fd").iterdir())
            names |= {Path(link).name for link in links if link.startswith(f"{_MEMORY}/")}
        except OSError:  # it has ended, or is another user's, who cannot open this user's memory
            continue
    return names
