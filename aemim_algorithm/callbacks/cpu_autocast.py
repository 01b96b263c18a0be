"""bfloat16 autocast on a CPU, which Composer's precisions do not offer."""

from __future__ import annotations

import torch
from composer.core import Callback, State
from composer.loggers import Logger

__all__ = ["CpuAutocast"]


class CpuAutocast(Callback):
    """Run the forward and the loss of each micro-batch in bfloat16 autocast, as Composer does on a GPU.

    From ``BEFORE_FORWARD`` to ``AFTER_LOSS``, with all that algorithms do between; data, optimizer and
    evaluation stay in float32. There is no cache of the weights in bfloat16, so the gradients of several
    passes of one micro-batch are summed in float32.
    """

    def __init__(self) -> None:
        self._context: torch.autocast | None = None

    def before_forward(self, state: State, logger: Logger) -> None:
        """Begin; a micro-batch that failed may have left it begun."""
        self._end()
        self._context = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)
        self._context.__enter__()

    def after_loss(self, state: State, logger: Logger) -> None:
        """End, after the algorithms."""
        self._end()

    def close(self, state: State, logger: Logger) -> None:
        """End, whatever has happened."""
        self._end()

    def _end(self) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)
        self._context = None
