"""From what a recipe names as data to a folder of MDS shards, converted on first use."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer.utils import dist

from aemim_algorithm.data.convert import convert, report_path
from aemim_algorithm.data.photos import write_photos
from aemim_algorithm.recipes.schema import DataRecipe

__all__ = [
    "PHOTOS",
    "is_remote",
    "is_shards",
    "is_without_index",
    "place_of",
    "shards_of",
    "test_shards",
    "train_shards",
]

PHOTOS = "photos"
_POLL = 1.0  # seconds between two looks of a process that waits for the conversion


def train_shards(data: DataRecipe) -> Path:
    """Folder of the training shards; written first if need be.

    Args:
        data: The recipe's data section.

    Returns:
        The folder; for a remote source the one that shards will be downloaded into.

    Raises:
        ConversionError: If the source cannot be converted; nothing is left behind.
    """
    return shards_of(data.source, data, split="train")


def test_shards(data: DataRecipe) -> Path | None:
    """Folder of the test shards, written first if need be, or ``None`` if the recipe names none."""
    source = data.test_source or (PHOTOS if data.source == PHOTOS else None)
    return shards_of(source, data, split="test") if source else None


def shards_of(source: str, data: DataRecipe, *, split: str) -> Path:
    """The shards of one source; ``split`` chooses the half of the embedded photographs."""
    target = place_of(source, data, split=split)
    if is_shards(source) or is_remote(source):
        return target
    if source == PHOTOS:
        return _written_once(target, lambda: write_photos(target.parent))
    options: dict[str, Any] = {
        "resize": data.resize,
        "skip_broken": data.skip_broken,
        "split": split,
    }

    def write() -> None:
        done = convert(source, target, **options)
        if done.broken:
            report = report_path(target)
            print(
                f"left out {len(done.broken)} files that are not images, named in {report}", file=sys.stderr
            )

    return _written_once(target, write)


def place_of(source: str, data: DataRecipe, *, split: str) -> Path:
    """Where the shards of one source are, or will be once it is converted."""
    if is_shards(source):
        return Path(source)
    if is_remote(source):
        return Path(data.cache, _cache_name(source.rstrip("/"), source))
    if source == PHOTOS:
        return Path(data.cache, PHOTOS, split)
    return cached_at(source, data, split=split)


def cached_at(source: str, data: DataRecipe, *, split: str) -> Path:
    """Where the shards of a local source go; another file or another size has another place.

    A folder keeps its place when its files change: :func:`convert` then refuses, naming the place.
    """
    path = Path(source).resolve()
    stat = path.stat()
    version = (stat.st_size, stat.st_mtime_ns) if path.is_file() else ()
    identity = (path, version, split, data.resize, data.skip_broken)
    return Path(data.cache, _cache_name(path.stem, *identity))


def is_remote(source: str) -> bool:
    """Whether a source is the URL of shards."""
    return "://" in source


def is_shards(source: str) -> bool:
    """Whether a source is a local folder of MDS shards already."""
    return Path(source, "index.json").is_file()


def is_without_index(folder: Path) -> bool:
    """Whether a folder holds shards, and not the index that they need."""
    return not (folder / "index.json").is_file() and any(folder.glob("*.mds*"))


def _cache_name(name: str, *identity: object) -> str:
    digest = hashlib.sha256(repr([str(part) for part in identity]).encode()).hexdigest()[:10]
    return f"{name.rsplit('/', 1)[-1]}-{digest}"


def _written_once(target: Path, write: Callable[[], object]) -> Path:
    """Let one process per machine write a folder, which appears only when it is complete.

    Writing again does nothing where the same source was written, and refuses where it has changed.
    """
    if dist.get_local_rank() == 0:
        write()
        return target
    # Not a barrier: converting a large data set outlasts any collective's timeout. Should the writer
    # fail, its launcher ends this process.
    while not is_shards(str(target)):
        time.sleep(_POLL)
    return target
