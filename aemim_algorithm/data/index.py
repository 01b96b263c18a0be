"""The index of a folder of MDS shards, and whether the shards are what it says."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from streaming import LocalDataset
from streaming.base.format.mds.encodings import is_mds_encoding_safe
from streaming.base.hashing import get_hash, is_hash

from aemim_algorithm.data.shards import COLUMNS

__all__ = [
    "check_columns",
    "check_shards",
    "encodings_of",
    "files_of",
    "hash_of",
    "no_hash",
    "open_samples",
    "read_index",
    "require_hashes",
    "sizes_in",
    "verify_shards",
]

_FORMAT, _VERSION = "mds", 2
_INTEGERS = {"int", "str_int", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}


def read_index(folder: Path, *, name: str | None = None) -> list[dict[str, Any]]:
    """Read what the index says about the shards of a folder, without looking for them.

    Args:
        folder: Folder of the shards.
        name: What a message calls the folder; None: its path.

    Returns:
        The shards; at least one.

    Raises:
        ValueError: There is no index, it cannot be read or is not one of MDS, or there are no samples.
    """
    index, name = folder / "index.json", name or str(folder)
    if not index.is_file():
        raise ValueError(f"{name} has no index.json: expected shards that `aemim data` wrote")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        shards: list[dict[str, Any]] = content["shards"]
        kinds = {str(shard["format"]) for shard in shards}
        sound = content["version"] == _VERSION if shards else True
        sound = sound and all(map(_is_sound, shards))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}/index.json is no index of shards: write the shards again") from error
    if other := sorted(kinds - {_FORMAT}):
        raise ValueError(
            f"{name} holds shards of the format {other[0]!r}, expected {_FORMAT!r}: write the shards with "
            "`aemim data`"
        )
    if not sound:
        raise ValueError(f"{name}/index.json is no index of shards: write the shards again")
    if not sum(shard["samples"] for shard in shards):
        raise ValueError(f"{name} has no samples: write the shards again")
    return shards


def _is_sound(shard: dict[str, Any]) -> bool:
    """Whether a shard's description has all that reading it needs."""
    files = files_of(shard)
    columns = [shard[key] for key in ("column_names", "column_encodings", "column_sizes")]
    return (
        isinstance(shard["samples"], int)
        and shard["samples"] >= 0
        and bool(shard["raw_data"])
        and all(isinstance(file["basename"], str) and isinstance(file["bytes"], int) for file in files)
        and all(isinstance(file.get("hashes", {}), dict) for file in files)
        and all(isinstance(column, list) for column in columns)
        and len({len(column) for column in columns}) == 1
    )


def files_of(shard: dict[str, Any]) -> list[dict[str, Any]]:
    """The files that a shard can be read from: it as such, and its compressed form if it has one."""
    return [shard[kind] for kind in ("raw_data", "zip_data") if shard.get(kind)]


def check_shards(folder: Path) -> list[dict[str, Any]]:
    """Check that local shards are all there: at a gap streaming ends the epoch early, or hangs.

    Args:
        folder: Folder of the shards.

    Returns:
        The shards as the index describes them; at least one.

    Raises:
        ValueError: There is no index, a shard is missing or cut short, or there are no samples.
    """
    shards = read_index(folder)
    sizes = sizes_in(folder, shards)
    for shard in shards:
        files = files_of(shard)
        if not any(sizes.get(file["basename"]) == file["bytes"] for file in files):
            name, expected = files[0]["basename"], files[0]["bytes"]
            found = f"{sizes[name]:,} bytes" if name in sizes else "nothing"
            fault = f"is missing or cut short: expected {expected:,} bytes, found {found}"
            raise ValueError(f"{folder}: {name} {fault}: get it again")
    return shards


def sizes_in(folder: Path, shards: list[dict[str, Any]]) -> dict[str, int]:
    """Bytes of the files that lie where the shards of an index do, by their names in it."""
    places = {os.path.dirname(file["basename"]) for shard in shards for file in files_of(shard)}
    sizes: dict[str, int] = {}
    for place in places:
        try:
            with os.scandir(folder / place) as entries:
                sizes |= {os.path.join(place, entry.name): entry.stat().st_size for entry in entries}
        except FileNotFoundError:
            continue  # all of its shards are missing, which the caller says
    return sizes


def verify_shards(folder: Path, shards: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """Compare the shards that are in a folder with the hashes in their index, several at a time.

    Args:
        folder: Folder of the shards.
        shards: As the index describes them, with hashes.

    Returns:
        Number of files read, and the names of those that are not what was written.
    """
    present = sizes_in(folder, shards)
    files = [file for shard in shards for file in files_of(shard) if file["basename"] in present]
    with ThreadPoolExecutor() as pool:  # reading and hashing release Python's lock
        return len(files), [name for name in pool.map(partial(_differs, folder), files) if name]


def require_hashes(folder: Path | str, shards: list[dict[str, Any]]) -> None:
    """Raise `ValueError` unless every shard of an index can be verified."""
    if bare := [file for shard in shards for file in files_of(shard) if not hash_of(file.get("hashes"))]:
        raise ValueError(no_hash(folder, bare[0]["basename"]))


def no_hash(folder: Path | str, name: str) -> str:
    """What to say of shards that cannot be verified."""
    remedy = "write the shards with `aemim data`, or leave verify out"
    return f"{folder}: the index has no hash of {name}: {remedy}"


def _differs(folder: Path, file: dict[str, Any]) -> str | None:
    """The name of a file that has not its hash."""
    name, expected = str(file["basename"]), hash_of(file["hashes"])
    try:
        return (
            name if expected and get_hash(expected[0], (folder / name).read_bytes()) != expected[1] else None
        )
    except FileNotFoundError:  # another run shares the cache, and removed it as this one would
        return None


def hash_of(hashes: dict[str, str] | None) -> tuple[str, str] | None:
    """Kind and value of a file's first hash that can be computed here, if there is one."""
    return next(((kind, value) for kind, value in (hashes or {}).items() if is_hash(kind)), None)


def check_columns(folder: str, columns: dict[str, str]) -> None:
    """Check that shards have an image, as the bytes of a file, and a label, which is an integer.

    Args:
        folder: What a message calls them.
        columns: How each of their columns is encoded, by its name.

    Raises:
        ValueError: They have not, or there is a column that streaming does not read.
    """
    remedy = "write the shards with `aemim data`"
    if not set(COLUMNS) <= set(columns):
        raise ValueError(f"{folder} has the columns {sorted(columns)}, expected {sorted(COLUMNS)}: {remedy}")
    for name, allowed in {"image": {"bytes"}, "label": _INTEGERS}.items():
        if columns[name] not in allowed:
            got, expected = columns[name], COLUMNS[name]
            raise ValueError(f"{folder} has the column {name} as {got!r}, expected {expected!r}: {remedy}")
    for name, encoding in columns.items():
        if not is_mds_encoding_safe(encoding):
            raise ValueError(
                f"{folder} has the column {name} as {encoding!r}, which can run any code: {remedy}"
            )


def encodings_of(shard: dict[str, Any]) -> dict[str, str]:
    """How each column of a shard is encoded, by its name."""
    return dict(zip(shard["column_names"], shard["column_encodings"], strict=True))


def open_samples(
    folder: Path, *, check: Callable[[str, dict[str, str]], None] = check_columns
) -> LocalDataset:
    """Open local shards to read samples by their number; uses no shared memory.

    Args:
        folder: Folder of the shards.
        check: Called with the folder's name and a shard's columns, raises `ValueError` where they are not
            what is expected.

    Returns:
        The samples, in the order of the shards.

    Raises:
        ValueError: See `check_shards` and `check`.
    """
    for shard in check_shards(folder):
        check(str(folder), encodings_of(shard))
    with warnings.catch_warnings():  # LocalDataset leaves index.json open
        warnings.simplefilter("ignore", ResourceWarning)
        return LocalDataset(str(folder))
