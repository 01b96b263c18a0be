"""Checkpoints of a run as files: which there are, whether one is whole, how one appears at once.

A checkpoint is one file, ``ep1-ba90-rank0.pt``, or, where FSDP saves sharded, a folder ``ep1-ba90`` of what
every rank wrote. ``latest-rank0.pt`` links to the newest. What is being written has a hidden name that ends
in ``.partial``.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import zipfile
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader

__all__ = [
    "FILE_NAME",
    "LATEST_NAME",
    "batch_of",
    "checkpoints_in",
    "damage",
    "link",
    "publish",
    "remove",
    "remove_partial",
    "sync",
]

FILE_NAME = "ep{epoch}-ba{batch}-rank{rank}.pt"
LATEST_NAME = "latest-rank{rank}.pt"

# Errors that say nothing of what is in a file.
_UNKNOWN = {
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ETIMEDOUT,
}
_CHECKPOINT = re.compile(r"ep(\d+)-ba(\d+)(-rank0\.pt)?")


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, newest first."""
    found = {path: _CHECKPOINT.fullmatch(path.name) for path in folder.glob("ep*")}
    times = {path: (int(match[2]), int(match[1])) for path, match in found.items() if match}
    return sorted(times, key=lambda path: times[path], reverse=True)


def batch_of(checkpoint: Path) -> int:
    """The batch after which a checkpoint was written."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None  # of `checkpoints_in`
    return int(match[2])


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: cut short, a part missing, or bytes that have changed.

    Every byte is read once and compared with the checksums that torch writes and does not look at when it
    loads; some 2 GB/s and core where the file is in memory, and then it is, for the load.

    Args:
        checkpoint: As :func:`checkpoints_in` names it.

    Returns:
        A few words, or ``None`` if it is whole.

    Raises:
        OSError: If it cannot be known: it may not be read, or not now.
    """
    try:
        if checkpoint.is_dir():
            return _damage_of_parts(checkpoint)
        found = _damage_of_archive(checkpoint)
        if found is None:
            torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=False)  # reads no tensor
        return found
    except OSError as error:
        if error.errno in _UNKNOWN:
            raise
        return error.strerror or str(error)
    except Exception as error:  # changed bytes can make a reader raise anything
        return " ".join(str(error).split())[:120] or type(error).__name__


def publish(partial: Path, name: str) -> Path:
    """Give what was written its name, once it is on the disk; an older one of that name is replaced.

    Args:
        partial: A file or a folder, in a hidden folder inside the run's.
        name: Its final name, in the run's folder.

    Returns:
        Its final path.

    Raises:
        OSError: If that fails; then it has the old name or is gone.
    """
    target = partial.parent.parent / name
    sync(partial)
    if target.is_dir():
        remove(target)  # a rename cannot replace a folder that is not empty
    os.replace(partial, target)
    sync(target.parent)
    return target


def link(checkpoint: Path, name: str) -> None:
    """Make ``name``, beside a checkpoint, a link to it; at no moment is there none."""
    partial = checkpoint.with_name(f".{name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(checkpoint.name)
    os.replace(partial, checkpoint.with_name(name))
    sync(checkpoint.parent)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; no moment leaves part of one under its name."""
    if checkpoint.is_dir():
        partial = checkpoint.with_name(f".{checkpoint.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        checkpoint = checkpoint.rename(partial)
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink()


def remove_partial(folder: Path) -> None:
    """Delete what a run that was killed had not finished to write; no run may be writing there."""
    for path in folder.glob(".*.partial"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's files and entries, are on the disk."""
    for inner in path.iterdir() if path.is_dir() and path.name.startswith("ep") else ():
        sync(inner)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _damage_of_archive(file: Path | io.BytesIO) -> str | None:
    with zipfile.ZipFile(file) as archive:
        changed = archive.testzip()
    return f"the bytes of its part {changed} have changed" if changed else None


def _damage_of_parts(folder: Path) -> str | None:
    """Of a sharded checkpoint: the archive of each tensor and object lies at a place in a rank's file."""
    metadata = FileSystemReader(folder).read_metadata()
    for place in (metadata.storage_data or {}).values():
        with open(folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            content = file.read(place.length)
        if len(content) < place.length:
            return f"{place.relative_path} is cut short"
        if found := _damage_of_archive(io.BytesIO(content)):
            return f"{place.relative_path}: {found}"
    return None
