"""What is found out about the data before training: is all of it there, is it what it was, does it suffice.

The first process of each machine looks, also at what dead runs have left there; its error is that of all.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.utils import dist
from streaming.base.util import bytes_to_int

from aemim_algorithm.data.cache import least_limit
from aemim_algorithm.data.cache_lock import hold_cache
from aemim_algorithm.data.index import (
    check_columns,
    check_shards,
    encodings_of,
    files_of,
    require_hashes,
    sizes_in,
    verify_shards,
)
from aemim_algorithm.data.leftovers import clean_leftovers
from aemim_algorithm.data.remote import fetch_index
from aemim_algorithm.data.space import free_bytes, in_units
from aemim_algorithm.recipes.datasets import is_remote
from aemim_algorithm.recipes.resuming import has_checkpoint
from aemim_algorithm.recipes.schema import RecipeError, TrainingRecipe

__all__ = [
    "DataFound",
    "check_data",
    "check_identity",
    "fingerprint_of",
    "inspect_data",
    "note_fingerprint",
    "on_each_machine",
]

FINGERPRINT = "data.json"
_POLL = 0.5  # seconds

Shards = list[dict[str, Any]]


@dataclass(frozen=True)
class DataFound:
    """Training data as it was found.

    Attributes:
        samples: Images in all shards.
        shards: How many shards the index names.
        present: How many of them are on this machine.
        size: Bytes of all shards.
        verified: Files that were compared with their hashes.
        leftovers: Files of dead runs that were removed from this machine.
        fingerprint: What tells these shards from others, wherever they are.
    """

    samples: int
    shards: int
    present: int
    size: int
    verified: int
    leftovers: int
    fingerprint: str

    def __str__(self) -> str:
        there = "all present" if self.present == self.shards else f"{self.present} of them on this machine"
        checked = f", {self.verified} verified by their hashes" if self.verified else ""
        removed = f"; removed {self.leftovers} files of dead runs" if self.leftovers else ""
        whole = f"{self.samples:,} images in {self.shards:,} shards, {in_units(self.size)}"
        return f"{whole}, {there}{checked}{removed}"


def check_data(recipe: TrainingRecipe, train: Path, test: Path | None = None) -> None:
    """Refuse to train on data that is incomplete, damaged, too little, or not that of the run so far.

    All processes call this; none trains before the last one has passed.

    Args:
        recipe: A loaded recipe.
        train: Folder of the training shards; for remote ones, the folder to download them into.
        test: Folder of the shards that the run is evaluated on, if it is.

    Raises:
        RecipeError: The recipe does not fit the data, or the disk does not.
        ValueError: The data cannot be read as a whole.
    """

    def look() -> DataFound:
        if test is not None:
            check_shards(test)
        return inspect_data(recipe, train)

    found = on_each_machine(look)
    if found is not None and dist.get_global_rank() == 0:
        note_fingerprint(recipe, found)


def inspect_data(recipe: TrainingRecipe, folder: Path, *, keep_index: bool = True) -> DataFound:
    """Look at the training data, on this machine and by this process alone.

    Args:
        recipe: A loaded recipe.
        folder: Folder of the shards; for remote ones, the folder to download them into.
        keep_index: Whether to leave the index of remote shards in that folder.

    Returns:
        What was found.

    Raises:
        RecipeError: See `check_data`.
        ValueError: See `check_data`.
    """
    data, remote = recipe.data, is_remote(recipe.data.source)
    leftovers = clean_leftovers()
    if remote:
        options: dict[str, Any] = {"retries": data.download_retries, "timeout": data.download_timeout}
        shards = fetch_index(data.source, folder, keep=keep_index, **options)
        if keep_index:
            _check_free(folder, alone=data.cache_limit is not None)
    else:
        shards = check_shards(folder)
    place = data.source if remote else str(folder)
    for shard in shards:
        check_columns(place, encodings_of(shard))
    verified = (
        _verify(place, folder, shards, remove=remote and keep_index, repair=remote) if data.verify else 0
    )
    sizes = sizes_in(folder, shards)
    found = DataFound(
        samples=sum(shard["samples"] for shard in shards),
        shards=len(shards),
        present=sum(_is_there(shard, sizes) for shard in shards),
        size=sum(_largest(shard) for shard in shards),
        verified=verified,
        leftovers=len(leftovers),
        fingerprint=fingerprint_of(shards),
    )
    _check_amount(recipe, found)
    check_identity(recipe, found)
    if remote:
        _check_cache(recipe, folder, shards, sizes)
    return found


def _verify(place: str, folder: Path, shards: Shards, *, remove: bool, repair: bool) -> int:
    """Compare the shards that are here with their hashes; what can be fetched again is no error."""
    require_hashes(place, shards)
    count, faulty = verify_shards(folder, shards)
    if faulty and not repair:
        which = f"{len(faulty)} of {count} shards are not what was written, first {faulty[0]}"
        raise ValueError(f"{folder}: {which}: get them again")
    for name in faulty if remove else ():
        (folder / name).unlink(missing_ok=True)
    return count - len(faulty)


def _check_free(folder: Path, *, alone: bool) -> None:
    """Refuse a cache that another run uses; the data set of the training holds it."""
    if (handle := hold_cache(folder, alone=alone)) is not None:
        os.close(handle)


def _is_there(shard: dict[str, Any], sizes: dict[str, int]) -> bool:
    return any(sizes.get(file["basename"]) == file["bytes"] for file in files_of(shard))


def _check_amount(recipe: TrainingRecipe, found: DataFound) -> None:
    """Each canonical node must have its part of one global batch at least."""
    nodes, batch = recipe.data.canonical_nodes, recipe.global_batch_size
    if found.samples // nodes < batch // nodes:
        raise RecipeError(
            f"global_batch_size={batch}: expected at most {found.samples // nodes * nodes}, as data.source="
            f"{recipe.data.source} has {found.samples} images"
        )


def _check_cache(recipe: TrainingRecipe, folder: Path, shards: Shards, sizes: dict[str, int]) -> None:
    """The cache must hold what the loaders need at once, and the disk what the cache may hold."""
    limit, whole = recipe.data.cache_limit, sum(_largest(shard) for shard in shards)
    if limit is not None:
        processes = dist.get_local_world_size() * max(recipe.data.workers, 1)
        index = (folder / "index.json").stat().st_size if (folder / "index.json").is_file() else 0
        least = least_limit(index=index, largest=max(map(_largest, shards)), processes=processes)
        if bytes_to_int(limit) < least:
            raise RecipeError(
                f"data.cache_limit={limit}: expected at least {in_units(least)} ({least} bytes) for the "
                f"{processes} loader processes of a machine"
            )
        whole = min(whole, bytes_to_int(limit))
    needed, free = whole - sum(sizes.values()), free_bytes(folder)
    if needed > free:
        raise RecipeError(
            f"data.cache={recipe.data.cache}: {in_units(free)} free, {in_units(needed)} needed for the "
            "shards: free some space, choose another disk or set data.cache_limit"
        )


def _largest(shard: dict[str, Any]) -> int:
    """Bytes that a shard may take, with its compressed form while it is unpacked."""
    return sum(file["bytes"] for file in files_of(shard))


def fingerprint_of(shards: Shards) -> str:
    """Digest of the shards' samples and bytes; the order of training follows from the former."""
    kept = [(shard["samples"], files_of(shard)[0]["bytes"]) for shard in shards]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def check_identity(recipe: TrainingRecipe, found: DataFound) -> None:
    """A run that continues does so with its own images, which may have moved."""
    note = Path(recipe.save_folder, FINGERPRINT)
    before = _noted(note) if has_checkpoint(note.parent) and note.is_file() else None
    if before is not None and before["fingerprint"] != found.fingerprint:
        raise RecipeError(
            f"data.source={recipe.data.source}: {found.samples} images in {found.shards} shards, which are "
            f"not the {before['samples']} in {before['shards']} that the run in {note.parent} was started "
            "with; choose another run_name"
        )


def _noted(note: Path) -> dict[str, Any] | None:
    """What was noted when the run began; None, with a warning, if a crash of the machine destroyed it."""
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
        return {key: before[key] for key in ("samples", "shards", "fingerprint")}
    except (ValueError, KeyError, TypeError):
        warnings.warn(
            f"{note} cannot be read, so whether the run has its own images is not known: it is written again",
            stacklevel=2,
        )
        return None


def note_fingerprint(recipe: TrainingRecipe, found: DataFound) -> None:
    """Note in the save folder what `check_identity` compares when the run continues."""
    note = Path(recipe.save_folder, FINGERPRINT)
    note.parent.mkdir(parents=True, exist_ok=True)
    partial = note.with_suffix(".partial")
    values = {"samples": found.samples, "shards": found.shards, "fingerprint": found.fingerprint}
    with partial.open("w", encoding="utf-8") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(note)


def on_each_machine(look: Callable[[], DataFound]) -> DataFound | None:
    """Let the first process of each machine do something long, while the others wait for it.

    They meet twice a second, so that no collective waits longer than its timeout.

    Args:
        look: What to do.

    Returns:
        Its result, on the processes that did it.

    Raises:
        Exception: Its own, where it failed; elsewhere a `ValueError` with the same message.
    """
    if dist.get_world_size() == 1:
        return look()
    outcome: list[DataFound | Exception] = []

    def run() -> None:
        try:
            outcome.append(look())
        except Exception as error:
            outcome.append(error)

    mine = dist.get_local_rank() == 0
    if mine:
        threading.Thread(target=run, daemon=True).start()
    while True:
        failure = str(outcome[0]) if outcome and isinstance(outcome[0], Exception) else None
        reports = dist.all_gather_object((bool(outcome) or not mine, failure))
        if all(done for done, _ in reports) or any(said is not None for _, said in reports):
            break
        time.sleep(_POLL)
    result = outcome[0] if outcome else None
    if isinstance(result, Exception):
        raise result
    for _, said in reports:
        if said is not None:
            raise ValueError(said)
    return result
