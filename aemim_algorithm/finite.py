"""Stops a run, or skips a batch, whose loss or gradients are NaN or infinite.

Whether they are stays on the device until the end of a batch: one reduction over the ranks and one look
cover all losses and gradients. Only where something is wrong the batch runs once more, forward and without
gradient, to find the layer (:mod:`aemim_algorithm.diagnosis`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from composer.core import Callback, Precision, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn

from aemim_algorithm.adapters import copies_of_buffers
from aemim_algorithm.diagnosis import Pass, describe_gradients, describe_losses
from aemim_algorithm.losses import total_loss
from aemim_algorithm.randomness import RngState
from aemim_algorithm.sharding import unwrapped
from aemim_algorithm.validation import require_choice, require_integer

__all__ = ["FiniteCheck"]


class FiniteCheck(Callback):
    """Let no optimizer step on a loss or on gradients that are not finite, on all ranks alike.

    AEMIM adds this callback where it is missing. A skipped batch changes no weight, no state of the
    optimizer and no buffer, such as running statistics; it is counted as a batch, and the schedulers go on.
    Under ``amp_fp16`` gradients that are not finite are the gradient scaler's business: only losses count.
    The batch's inputs stay on the device until its end, all micro-batches of them.

    Args:
        on_nonfinite: ``"stop"`` raises ``FloatingPointError``; ``"skip"`` warns, and goes on with the next
            batch.
        max_skips: Batches that may be skipped in a row, at least 1; the next one stops the run.

    Raises:
        ValueError: If an argument is out of range; at the start of training if the optimizer steps inside
            of a closure, as SAM does, where nothing can be skipped.
    """

    def __init__(self, *, on_nonfinite: str = "stop", max_skips: int = 10) -> None:
        require_choice("on_nonfinite", on_nonfinite, ("stop", "skip"))
        require_integer("max_skips", max_skips, low=1)
        self.on_nonfinite, self.max_skips = on_nonfinite, max_skips
        self._skipped = self._in_a_row = 0
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._forget()

    def _forget(self) -> None:
        self._passes: list[Pass] = []
        self._norms: dict[str, Tensor] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse to skip what cannot be skipped."""
        closures = [o for o in state.optimizers if getattr(o, "_step_supports_amp_closure", False)]
        if self.on_nonfinite == "skip" and closures:
            raise ValueError(
                f"on_nonfinite='skip' cannot work with {type(closures[0]).__name__}, which steps before the "
                "batch is known to be finite: expected 'stop', or another optimizer"
            )

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Forget a batch that was given up, e.g. for lack of memory."""
        self._forget()
        self._buffers = copies_of_buffers(state.model) if self.on_nonfinite == "skip" else []

    def before_forward(self, state: State, logger: Logger) -> None:
        """Remember what a micro-batch's passes start from."""
        self._passes.append(Pass(state.batch, RngState.capture()))

    def after_loss(self, state: State, logger: Logger) -> None:
        """Look at a micro-batch's loss."""
        loss: Any = state.loss
        parts = dict(loss) if isinstance(loss, Mapping) else {"training": total_loss(loss)}
        self._passes[-1].finite.update({n: part.detach().isfinite().all() for n, part in parts.items()})

    def after_backward(self, state: State, logger: Logger) -> None:
        """Look at what the gradients are so far: later, algorithms may clip them and spread a NaN to all."""
        if state.precision != Precision.AMP_FP16:
            self._norms = sizes_of_gradients(unwrapped(state.model))

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Raise or skip if anything was not finite on any rank."""
        if self._all_finite(state):
            self._in_a_row = 0
        else:
            self._refuse(state)
        self._forget()
        if self.on_nonfinite == "skip":
            logger.log_metrics({"train/skipped_batches": self._skipped})

    def state_dict(self) -> dict[str, Any]:
        """How many batches were skipped, at all and just before."""
        return {"skipped": self._skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self._skipped, self._in_a_row = state["skipped"], state["in_a_row"]

    def _all_finite(self, state: State) -> bool:
        flags = [flag for each in self._passes for flag in each.finite.values()]
        flags += [torch.stack([*self._norms.values()]).isfinite().all()] if self._norms else []
        everything = torch.stack(flags).all().int() if flags else torch.ones((), dtype=torch.int32)
        everything = state.device.tensor_to_device(everything)
        dist.all_reduce(everything, reduce_operation="MIN")
        return bool(everything.item())

    def _refuse(self, state: State) -> None:
        batch = int(state.timestamp.batch)
        model = unwrapped(state.model)
        precision = partial(get_precision_context, state.precision, state.precision_config)
        text = describe_losses(model, self._passes, precision) or describe_gradients(self._norms)
        if self.on_nonfinite == "stop" or self._in_a_row >= self.max_skips:
            after = f" after {self._in_a_row} batches in a row were skipped" if self._in_a_row else ""
            raise FloatingPointError(
                f"batch {batch}: {text}{after}; the optimizer was not stepped. {_REMEDY}"
            )
        self._skip(state)
        if dist.get_global_rank() == 0:
            warnings.warn(f"batch {batch}: {text}; it is skipped ({self._skipped} in all)", stacklevel=2)

    def _skip(self, state: State) -> None:
        self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1
        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=True)  # so that it steps nowhere, not even by weight decay
        for buffer, values in self._buffers:
            buffer.copy_(values)


_REMEDY = (
    "Continue with on_nonfinite=skip, or with precision amp_bf16 instead of amp_fp16; or start another run "
    "from a checkpoint's weights, with a lower learning rate or gradient clipping"
)


def sizes_of_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The sum of magnitudes of each parameter's gradient, this rank's shard of it.

    Returns:
        By the parameter's name, in their order: scalars on the device, NaN or infinite where the gradient
        is (a sum of squares would be where it is 1e20). Nothing waits for the device.
    """
    found = {
        name: getattr(parameter.grad, "_local_tensor", parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    norms = torch._foreach_norm([*found.values()], 1) if found else ()
    return dict(zip(found, norms, strict=True))
