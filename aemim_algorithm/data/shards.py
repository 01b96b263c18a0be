"""Folders of MDS shards: written whole or not at all, and described.

Everything is written into a hidden folder beside the target and renamed at the end, so a folder
of shards that exists is complete. `conversion.json` in it tells what it was made from.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from streaming import MDSWriter

from aemim_algorithm.data.abandoned import held, remove_abandoned

__all__ = [
    "COLUMNS",
    "DESCRIPTION",
    "HASH",
    "Conversion",
    "ConversionError",
    "check_space",
    "describe",
    "existing",
    "staged",
    "write_samples",
    "write_shards",
]

COLUMNS = {"image": "bytes", "label": "int"}
DESCRIPTION = "conversion.json"
HASH = "xxh64"  # of each shard, in the index: for accidents, not for attacks, and as fast as memory


class ConversionError(ValueError):
    """Shards could not be written; the message is one line, and no shard was left behind."""


@dataclass(frozen=True)
class Conversion:
    """What a folder of shards holds.

    Attributes:
        samples: Number of images in the shards.
        classes: Class names; a label is a position in them.
        broken: Names of the source's files that were left out because they are not images.
    """

    samples: int
    classes: tuple[str, ...]
    broken: tuple[str, ...] = field(default=())


def write_shards(
    samples: Iterable[tuple[bytes, int]],
    folder: Path,
    *,
    classes: tuple[str, ...],
    made_from: dict[str, Any],
    broken: list[str] | None = None,
) -> Conversion:
    """Write samples and their description into a folder, which the caller stages.

    Args:
        samples: Pairs of an image file's bytes and a label.
        folder: An empty or missing folder.
        classes: Class names by label.
        made_from: What `existing` compares: source and options, no machine's paths.
        broken: Names left out; read after the last sample, so `samples` may still fill it.

    Returns:
        What was written.
    """
    rows = ({"image": image, "label": label} for image, label in samples)
    count = write_samples(rows, folder, columns=COLUMNS)
    conversion = Conversion(count, classes, tuple(broken or ()))
    describe(folder, {"made_from": made_from, **asdict(conversion)})
    return conversion


def write_samples(samples: Iterable[dict[str, Any]], folder: Path, *, columns: dict[str, str]) -> int:
    """Write samples of any columns into a folder, which the caller stages.

    Args:
        samples: Values by column.
        folder: An empty or missing folder.
        columns: How each is encoded.

    Returns:
        Number of samples.
    """
    writer = MDSWriter(out=str(folder), columns=columns, hashes=[HASH])
    count = 0
    try:
        for sample in samples:
            writer.write(sample)
            count += 1
        writer.finish()
    finally:  # not `with MDSWriter`: its exit flushes again, onto the same full disk
        writer.cancel_future_jobs()
    return count


def describe(folder: Path, content: dict[str, Any]) -> None:
    """Write what shards hold beside them, with the versions of what wrote them."""
    versions = {name: version(name) for name in ("mosaicml-streaming", "torchvision")}
    text = json.dumps({**content, "versions": versions}, indent=1)
    (folder / DESCRIPTION).write_text(text, encoding="utf-8")


def existing(out: Path, made_from: dict[str, Any]) -> Conversion | None:
    """Look for finished shards of the same source with the same options.

    Args:
        out: Where shards are to be written.
        made_from: As given to `write_shards`.

    Returns:
        What is there, or None where nothing is (or an empty folder).

    Raises:
        ConversionError: Something else is there.
    """
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        description = json.loads((out / DESCRIPTION).read_text(encoding="utf-8"))
        complete = (out / "index.json").is_file() and description["made_from"] == made_from
    except (OSError, ValueError, KeyError):
        complete = False
    if not complete:
        raise ConversionError(
            f"{out} exists and is no conversion of this source with these options: "
            "remove it or choose another folder"
        )
    return Conversion(description["samples"], tuple(description["classes"]), tuple(description["broken"]))


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, renamed to it on success and removed on any exception.

    Args:
        out: The folder to make.

    Yields:
        The folder to write into.

    Raises:
        ConversionError: The disk is full.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = out.parent / f".{out.name}.{os.getpid()}.partial"
    remove_abandoned(out)
    stage.mkdir()
    try:
        with held(stage):
            yield stage
            _publish(stage, out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.rmtree(stage, ignore_errors=True)
        raise ConversionError(_disk_full(out, "more needed")) from error
    finally:  # also after KeyboardInterrupt; nothing is left to remove after the rename
        shutil.rmtree(stage, ignore_errors=True)


def _publish(stage: Path, out: Path) -> None:
    """Rename the stage to ``out``, unless another process was first to write just the same there."""
    try:
        stage.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or _files(stage) != _files(out):
            raise


def _files(folder: Path) -> set[tuple[Path, int]]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {(path.relative_to(folder), path.stat().st_size) for path in found}


def check_space(out: Path, needed: int) -> None:
    """Raise `ConversionError` unless the disk that will hold `out` has `needed` bytes free."""
    if needed > shutil.disk_usage(out.parent).free:
        raise ConversionError(_disk_full(out, f"at least {needed / 2**20:,.1f} MiB needed"))


def _disk_full(out: Path, detail: str) -> str:
    free = shutil.disk_usage(out.parent).free / 2**20
    return (
        f"disk full while writing {out}: {free:,.1f} MiB free, {detail}; "
        "nothing is left behind: free some space or choose another disk"
    )
