"""A batch that Composer repeats with smaller micro-batches, because it ran out of memory."""

from __future__ import annotations

from composer.core import State
from torch import Tensor

from aemim_algorithm.adapters import copies_of_buffers
from aemim_algorithm.randomness import RngState

__all__ = ["RepeatedBatch"]


class RepeatedBatch:
    """Makes an attempt at a batch start as the first one did: same generators, same running statistics.

    So a batch that failed ends as if it had begun with the smaller micro-batches. An optimizer that calls
    its closure more than once is no repetition: the size of the micro-batches stays.
    """

    def __init__(self) -> None:
        self._rng: RngState | None = None
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._micro_batch_size: int | float | None = None

    def start_batch(self) -> None:
        """The next attempt is the first one at its batch."""
        self._rng = None

    def start_attempt(self, state: State) -> None:
        """Remember how the first attempt started; put everything back for a repetition."""
        size = state.device_train_microbatch_size
        if self._rng is None:
            self._rng = RngState.capture()
            self._buffers = copies_of_buffers(state.model) if state.auto_microbatching else []
        elif size != self._micro_batch_size:
            self._rng.restore()
            for buffer, values in self._buffers:
                buffer.copy_(values)
        self._micro_batch_size = size
