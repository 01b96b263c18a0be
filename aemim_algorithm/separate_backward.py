"""The clean branch's backward ahead of the attack, so that one branch's activations are held at a time.

Of λ·L_c + (1−λ)·L_a (Eq. 5) the first part is differentiated as soon as the clean loss is known; gradients
add up in ``.grad``, and the attack needs nothing of the clean pass but its features. Peak memory is about
that of training without AEMIM; the passes are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from composer.core import Precision, State
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from aemim_algorithm.adapters import adapters_of
from aemim_algorithm.losses import total_loss
from aemim_algorithm.samples import first_dimension, map_tensors

__all__ = [
    "HeldBack",
    "backward_clean",
    "expect_weight",
    "mean_batch_size",
    "require_separable",
    "untouched",
    "weight_of",
]


def backward_clean(loss: Any, weight: float | Tensor) -> Any:
    """Run the backward of a clean loss.

    Args:
        loss: What ``ComposerModel.loss`` returned.
        weight: What its total counts in the step's loss.

    Returns:
        The loss without its graph.
    """
    total = total_loss(loss)
    with record_function("aemim/clean_backward"):
        total.backward(torch.as_tensor(weight, dtype=total.dtype, device=total.device))
    return map_tensors(loss, Tensor.detach)


def expect_weight(total: Tensor, weight: float | Tensor) -> None:
    """Make the backward of ``total`` fail if it comes with another weight than the clean one had.

    Raises:
        RuntimeError: In backward; on a GPU, where it is not waited for, as an assertion of the device.
    """
    message = (
        "the loss is weighted otherwise than separate_backward expected, by the share of its micro-batch in "
        "the batch: without a Trainer pass training_loss(weight=...) what the total is multiplied by; with "
        "one leave out separate_backward, if samples are not counted by the batch's first dimension"
    )

    def compare(gradient: Tensor) -> None:
        expected = torch.as_tensor(weight, dtype=gradient.dtype, device=gradient.device)
        torch._assert_async(torch.isclose(gradient, expected, rtol=1e-5, atol=0).all(), message)

    total.register_hook(compare)


def weight_of(state: State, batch_size: float) -> Tensor:
    """What the Trainer will multiply the loss of the present micro-batch by.

    Args:
        state: The Trainer's state, its ``batch`` a micro-batch.
        batch_size: Samples of the whole batch, as :func:`mean_batch_size` has it.

    Returns:
        Scalar: the micro-batch's share, and the factor of the gradient scaler under ``amp_fp16``.
    """
    share = torch.tensor(first_dimension(state.batch) / batch_size)
    share = state.device.tensor_to_device(share)
    if state.precision == Precision.AMP_FP16 and state.scaler is not None:
        return state.scaler.scale(share)
    return share


def mean_batch_size(state: State, size: int) -> float:
    """Samples of a rank's batch, on average over the ranks: what the Trainer divides by.

    Every rank must call it.
    """
    if dist.get_world_size() == 1:
        return size
    total = state.device.tensor_to_device(torch.tensor(size))
    dist.all_reduce(total, reduce_operation="SUM")
    return total.item() / dist.get_world_size()


def require_separable(model: nn.Module) -> None:
    """Refuse what two backward passes a step were not shown to be right with.

    Args:
        model: The model as it trains, wrapped.

    Raises:
        ValueError: If FSDP1 has sharded it.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "separate_backward=True under FSDP1, with which it was never run: leave it out, or train with "
            "FSDP2 or DDP"
        )


class HeldBack:
    """Keeps DDP from exchanging gradients after the first of two backward passes."""

    def __init__(self) -> None:
        self._held: tuple[DistributedDataParallel, bool] | None = None

    def hold(self, model: nn.Module) -> None:
        """Before the clean forward: its backward shall exchange nothing."""
        self.release()
        if isinstance(model, DistributedDataParallel):
            self._held = model, model.require_backward_grad_sync
            model.require_backward_grad_sync = False

    def release(self) -> None:
        """What the Trainer had decided holds for the passes that come next."""
        if self._held is not None:
            model, exchanges = self._held
            model.require_backward_grad_sync, self._held = exchanges, None


def untouched(model: nn.Module) -> Tensor | float:
    """Zero, with a zero gradient for what only the clean pass uses: DDP waits for every parameter."""
    clean = [ours for adapter in adapters_of(model) for ours, _ in adapter.twins() if ours.requires_grad]
    return 0.0 * torch.stack([parameter.sum() for parameter in clean]).sum() if clean else 0.0
