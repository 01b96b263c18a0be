"""Makes a run that is resumed in mid-epoch draw the random numbers that it would have drawn."""

from __future__ import annotations

import warnings
from typing import Any

from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, reproducibility

__all__ = ["RestoredRandomness"]


class RestoredRandomness(Callback):
    """Restores the generators from the checkpoint where Composer's Trainer does not.

    The Trainer restores them at the start of an epoch, or while it skips the batches that are done.
    A streaming data set skips them itself, so in mid-epoch they would start from the seed again.
    """

    def __init__(self) -> None:
        self._saved: Any = None

    def take_over(self, trainer: Trainer) -> None:
        """Take from a Trainer that has loaded a checkpoint what it would not restore.

        Another number of processes has no states of its own: it starts from a seed that belongs to the batch,
        with a warning.
        """
        state, saved = trainer.state, trainer._rng_state
        if saved is not None and len(saved) != dist.get_world_size():
            trainer._rng_state = None
            reproducibility.seed_all((state.seed + 1_000_003 * int(state.timestamp.batch)) % 2**32)
            if dist.get_global_rank() == 0:
                warnings.warn(
                    f"the checkpoint was saved by {len(saved)} processes and {dist.get_world_size()} go on: "
                    "samples, crops, masks and noise are those of the run; what a model draws, such as "
                    "dropout, is not",
                    stacklevel=2,
                )
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
