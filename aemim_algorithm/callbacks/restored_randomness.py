"""Makes a run that is resumed in mid-epoch draw the random numbers that it would have drawn."""

from __future__ import annotations

from typing import Any

from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import reproducibility

__all__ = ["RestoredRandomness"]


class RestoredRandomness(Callback):
    """Restores the generators from the checkpoint where Composer's Trainer does not.

    The Trainer restores them at the start of an epoch, or while it skips the batches that are done.
    A streaming data set skips them itself, so in mid-epoch they would start from the seed again.
    """

    def __init__(self) -> None:
        self._saved: Any = None

    def take_over(self, trainer: Trainer) -> None:
        """Take from a Trainer that has loaded a checkpoint what it would not restore."""
        if "train" in trainer.state.dataset_resumption and trainer.state.timestamp.batch_in_epoch > 0:
            self._saved, trainer._rng_state = trainer._rng_state, None

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Restore before the first batch's forward, but after the loader drew its own seed."""
        self._restore()

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Nothing was left of the epoch: restore before the loader of the next one draws its seed."""
        self._restore()

    def _restore(self) -> None:
        if self._saved is not None:
            reproducibility.load_rng_state(self._saved)
            self._saved = None
