"""A streaming data set whose failures are seen: in every process of the machine, with their reason.

Streaming reads ahead in threads. Where one of them fails, it ends the epoch early (in the training
process), or keeps all other loader processes waiting for a shard that nobody fetches any more.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from streaming import StreamingDataset
from streaming.base.constant import BARRIER_FILELOCK
from streaming.base.dataset import _ShardState
from streaming.base.shared import SharedArray

from aemim_algorithm.data.bounded import BoundedBarrier
from aemim_algorithm.data.leftovers import FAILURE, numbering, take_lease

__all__ = ["FailsAloud", "ShardError", "in_one_line"]

_REASON_BYTES = 1024


class ShardError(ValueError):
    """A shard could not be had; the message is one line."""


class FailsAloud(StreamingDataset):
    """A `StreamingDataset` in which a failed shard is an error of every process that waits for it.

    The reason stands in shared memory, so that each of them can tell it.

    Args:
        dist_timeout: Seconds that the processes of a machine wait for one another as an epoch starts.
        **options: As for `StreamingDataset`.
    """

    _failures: SharedArray
    _event: Event

    def __init__(self, *, dist_timeout: float = 300.0, **options: Any) -> None:
        with numbering():
            super().__init__(**options)
            self._shared_barrier = BoundedBarrier(self._shared_barrier, seconds=dist_timeout)
            # Streaming refuses a second data set in a cache, but passes over numbers that have a lock file,
            # as each of its data sets has once it is read: two runs that start together are to share, too.
            Path(self._filelock_root, f"{self._shm_prefix_int:06}_{BARRIER_FILELOCK}").touch()
        name = f"{self._shm_prefix_int:06}_{FAILURE}"
        self._failures = SharedArray(_REASON_BYTES, np.uint8, name)
        weakref.finalize(self, self._failures.shm.shm.close)
        # Not given back before the process ends, as streaming's memory of this number is not either.
        self._lease = take_lease(name)
        if self._unique_rank_world.is_local_leader:
            self._failures[:] = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over this process's samples of the next epoch.

        Raises:
            ShardError: A shard could not be had, by this process or another one of the machine.
        """
        if not hasattr(self, "_event"):
            self._event = _SharedEvent(self._failures)  # streaming sets up its own only if there is none
        self._raise_failure()
        return super().__iter__()

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """Read one sample; see `StreamingDataset`."""
        self._raise_failure()
        try:
            return super().get_item(sample_id, retry)
        except RuntimeError as error:  # streaming's, after `retry` attempts
            self._note(ShardError(str(error)))
        self._raise_failure()

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch a shard if it is not there; see `StreamingDataset`."""
        self._raise_failure()
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            self._note(error)
            self._shard_states[shard_id] = _ShardState.REMOTE  # nobody is to wait for it
            raise

    def on_exception(self, future: Future[None]) -> None:
        """Note that one of this process's threads failed; the process itself raises the error."""
        if (error := future.exception()) is not None:
            self._note(error)

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        yield from super()._each_sample_id(it)
        self._raise_failure()  # streaming would end the epoch here, as if it had been read

    def _note(self, error: BaseException) -> None:
        """Tell all processes of the machine; the first error is the one that counts."""
        if not self._failures[0]:
            text = " ".join(str(error).split()) or type(error).__name__
            told = np.frombuffer(text.encode()[: _REASON_BYTES - 1], np.uint8)
            self._failures[1 : len(told)] = told[1:]
            self._failures[0] = told[0]  # last, as the others look at it

    def _raise_failure(self) -> None:
        if self._failures[0]:
            told = self._failures.numpy().tobytes().rstrip(b"\0")
            raise ShardError(told.decode(errors="ignore"))


class _SharedEvent(Event):
    """Set as soon as any process of the machine has noted a failure."""

    def __init__(self, failures: SharedArray) -> None:
        super().__init__()
        self._failures = failures

    def is_set(self) -> bool:
        return super().is_set() or bool(self._failures[0])


@contextmanager
def in_one_line() -> Iterator[None]:
    """Raise what a loader process could not read as one line, without that process's traceback."""
    try:
        yield
    except ValueError as error:
        lines = str(error).strip().splitlines()
        if len(lines) < 2 or "DataLoader worker" not in lines[0]:
            raise
        _, _, reason = lines[-1].partition(": ")  # after the name of the exception
        raise type(error)(reason) from None
