"""Reading one sample, and saying in one line what is wrong with it or with its shard.

A sample that cannot be decoded may be replaced by another. A shard that is gone or cut short may not: it is
the storage that failed, and thousands of samples would go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from aemim_algorithm.data.failures import ShardError
from aemim_algorithm.data.transforms import decode

__all__ = ["BrokenSampleError", "locate", "read_sample"]


class BrokenSampleError(ValueError):
    """One sample that is not an image, of a shard that is whole; the message is one line."""


def read_sample(dataset: Any, sample_id: int, read: Callable[[int], dict[str, Any]]) -> tuple[Tensor, int]:
    """Read and decode one sample.

    Args:
        dataset: What it is of: a `StreamingDataset` or a `LocalDataset`.
        sample_id: Position in all shards together.
        read: Gives the sample's columns.

    Returns:
        The image, shape (3, height, width), uint8, and the label.

    Raises:
        BrokenSampleError: It cannot be decoded; names folder, sample and shard.
        ShardError: Its shard is gone or cut short, or cannot be downloaded.
    """
    try:
        with np.errstate(over="ignore"):  # damaged offsets are subtracted as unsigned numbers
            sample = read(sample_id)
        return decode(sample["image"]), int(sample["label"])
    except ShardError:
        raise
    # All that damaged bytes lead to.
    except (ValueError, IndexError, OverflowError, MemoryError, FileNotFoundError) as error:
        _check_shard(dataset, sample_id, error)
        raise BrokenSampleError(f"{locate(dataset, sample_id)}: {error}") from error


def locate(dataset: Any, sample_id: int) -> str:
    """Where a sample lies: "folder, sample 7 (shard.00000.mds)"."""
    path, _ = _shard_of(dataset, sample_id)
    return f"{path.parent}, sample {sample_id} ({path.name})"


def _check_shard(dataset: Any, sample_id: int, error: Exception) -> None:
    """Raise `ShardError` if it is not the sample alone that is damaged."""
    path, expected = _shard_of(dataset, sample_id)
    remote = any(stream.remote for stream in getattr(dataset, "streams", ()))
    remedy = "start again: it is fetched again" if remote else "get it again, then continue"
    if not path.exists():
        raise ShardError(f"{path} is missing: {remedy}") from error
    if (size := path.stat().st_size) != expected:
        raise ShardError(f"{path} has {size:,} bytes, expected {expected:,}: {remedy}") from error


def _shard_of(dataset: Any, sample_id: int) -> tuple[Path, int]:
    """Path of the shard of a sample, and the bytes that it should have."""
    shard_id, _ = dataset.spanner[sample_id]
    shard = dataset.shards[shard_id]
    return Path(shard.dirname, shard.split, shard.raw_data.basename), shard.raw_data.bytes
