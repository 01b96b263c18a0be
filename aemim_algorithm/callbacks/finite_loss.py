"""Stops a run whose loss is not finite. AEMIM has this guard built in; here it is for any other run."""

from __future__ import annotations

from composer.core import Callback, State
from composer.loggers import Logger

from aemim_algorithm.metrics import FiniteLossCheck

__all__ = ["FiniteLoss"]


class FiniteLoss(Callback):
    """Raise ``FloatingPointError`` before the optimizer steps on a loss that is NaN or infinite.

    Waits for the device once a batch, after the backward pass.
    """

    def __init__(self) -> None:
        self._check = FiniteLossCheck()

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Forget a batch that was given up, e.g. for lack of memory."""
        self._check = FiniteLossCheck()

    def after_loss(self, state: State, logger: Logger) -> None:
        """Look at a micro-batch's loss."""
        self._check.update(state.loss)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Raise if one was not finite."""
        self._check.require_finite(int(state.timestamp.batch))
