"""A cache of downloaded shards that never takes more than its limit, however many processes fill it.

Streaming counts a shard once it has arrived, so every process that is just downloading one goes over the
limit (by 2.7 shards with two workers, measured). Here a shard counts from when its download begins.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from streaming.base.constant import TICK
from streaming.base.dataset import _ShardState

from aemim_algorithm.data.cache_lock import hold_cache
from aemim_algorithm.data.failures import FailsAloud, ShardError

__all__ = ["BoundedCache", "least_limit"]

_NOBODY = -1  # a sample id that streaming skips
_THREADS = 3  # of one process that may each wait for another shard


def least_limit(*, index: int, largest: int, processes: int) -> int:
    """The smallest cache with which loader processes never wait for one another's shards.

    Args:
        index: Bytes of the index.
        largest: Bytes of the largest shard, plus those of its compressed form, if it has one.
        processes: Loader processes of one machine.

    Returns:
        Bytes.
    """
    return index + (_THREADS * processes + 1) * largest


class BoundedCache(FailsAloud):
    """A `StreamingDataset` that keeps to its `cache_limit`, and never removes shards that it cannot download.

    Args:
        cache_limit: Bytes, or "10gb"; None: no limit.
        **options: As for `StreamingDataset`, with `streams`.

    Raises:
        ShardError: Another run uses the cache, and one of the two has a limit.
        ValueError: There is a limit for shards that are not remote; while iterating, it is too low.
    """

    def __init__(self, *, cache_limit: int | str | None = None, **options: Any) -> None:
        if cache_limit is not None and any(stream.remote is None for stream in options["streams"]):
            raise ValueError(
                f"cache_limit={cache_limit}: expected None for local shards, which it would delete"
            )
        held = [
            _hold(stream.local, alone=cache_limit is not None)
            for stream in options["streams"]
            if stream.remote
        ]
        release = weakref.finalize(self, _close, held)
        try:
            super().__init__(cache_limit=cache_limit, **options)
        except BaseException:
            release()
            raise

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over this process's samples of the next epoch; see `FailsAloud`."""
        if self.cache_limit is not None:
            processes = self._unique_rank_world.detect_workers().workers_per_node
            index = sum(stream.get_index_size() for stream in self.streams)
            largest = max(shard.get_max_size() for shard in self.shards)
            least = least_limit(index=index, largest=largest, processes=processes)
            if int(self.cache_limit) < least:
                raise ValueError(
                    f"cache_limit={self.cache_limit}: expected at least {least} bytes for {processes} loader "
                    f"processes and shards of up to {largest} bytes"
                )
        return super().__iter__()

    def _ready_thread(self, it: Any) -> None:
        """Follow the downloads, ahead of what is read; streaming starts this in a thread for each epoch.

        Its own waits for ever for a shard that arrives and is evicted again between two looks.
        """
        while not (it.should_exit() or self._event.is_set() or it.ready_index == it.total):
            if self.predownload is not None and it.ready_index - it.yield_index > self.predownload:
                sleep(TICK)
                continue
            sample = int(it.sample_ids[it.ready_index])
            if sample == _NOBODY or self._is_here(self.spanner[sample][0], it):
                it.ready_index += 1
        it.on_exit()

    def _is_here(self, shard: int, it: Any) -> bool:
        """Wait for a shard, and fetch it if nobody does; False if the epoch is given up meanwhile."""
        while self._shard_states[shard] != _ShardState.LOCAL:
            if it.should_exit() or self._event.is_set():
                return False
            if self._shard_states[shard] == _ShardState.REMOTE:
                self.prepare_shard(shard, blocking=False)
            else:
                sleep(TICK)
        return True

    @property
    def cache_usage(self) -> int:
        """Bytes of the shards that are here or on their way."""
        return int(self._cache_usage.get()) + self._arriving()

    @cache_usage.setter
    def cache_usage(self, value: int) -> None:
        self._cache_usage.set(value - self._arriving())

    def _arriving(self) -> int:
        arriving = np.flatnonzero(self._shard_states.numpy() == _ShardState.PREPARING)
        return sum(self.shards[shard].get_max_size() for shard in arriving)


def _hold(local: str, *, alone: bool) -> int | None:
    """The lock of a cache, taken by the first process of the machine; a refusal is that of all processes."""
    handle, refusal = None, ""
    if dist.get_local_rank() == 0:
        try:
            handle = hold_cache(Path(local), alone=alone)
        except ShardError as error:
            refusal = str(error)
    refusals = dist.all_gather_object(refusal) if torch.distributed.is_initialized() else [refusal]
    if any(refusals):
        _close([handle])
        raise ShardError(next(filter(None, refusals)))
    return handle


def _close(handles: list[int | None]) -> None:
    for handle in handles:
        if handle is not None:
            os.close(handle)
