"""How long a Trainer takes for a batch, and how much of that it waits for data."""

from __future__ import annotations

import time

from composer.core import Callback, State
from composer.loggers import Logger
from turns import synchronize

__all__ = ["BatchClock"]


class BatchClock(Callback):
    """Times the batches of one ``fit``, from the end of the first one to the end of the last.

    The first batch waits for the start of an epoch, which costs the same whatever follows.

    Args:
        batches: Batches of the ``fit``, at least 2.
        device: ``"cpu"`` or ``"cuda"``, which is waited for at both ends and nowhere between.
    """

    def __init__(self, batches: int, device: str) -> None:
        self._batches, self._device = batches, device
        self._begun = self._asked = self._waited = self._lasted = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Forget an earlier ``fit``."""
        self._waited = self._lasted = 0.0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """The Trainer asks for a batch."""
        self._asked = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """The Trainer has its batch."""
        self._waited += time.perf_counter() - self._asked

    def batch_end(self, state: State, logger: Logger) -> None:
        """Start or stop, after the first and the last batch."""
        done = int(state.timestamp.batch)
        if done in (1, self._batches):
            synchronize(self._device)
        if done == 1:
            self._begun, self._waited = time.perf_counter(), 0.0
        if done == self._batches:
            self._lasted = time.perf_counter() - self._begun

    def seconds(self) -> dict[str, float]:
        """Of the last ``fit``, per batch: ``"batch"`` and, a part of it, ``"waiting"``."""
        timed = self._batches - 1
        return {"batch": self._lasted / timed, "waiting": self._waited / timed}
