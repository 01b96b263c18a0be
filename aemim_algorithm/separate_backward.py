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
from torch.utils.hooks import RemovableHandle

from aemim_algorithm.losses import total_loss
from aemim_algorithm.samples import first_dimension, map_tensors

__all__ = [
    "HeldBack",
    "backward_clean",
    "expect_weight",
    "mean_batch_size",
    "require_separable",
    "touching",
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
    if total.requires_grad:  # not if all that is trained belongs to the adversarial branch
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
        Scalar: the micro-batch's share, times the gradient scaler's factor under ``amp_fp16``.
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


def require_separable(model: nn.Module, state: State) -> None:
    """Refuse FSDP1, under which two backward passes were never run, and a search for micro-batches by ranks.

    Args:
        model: The model as it trains, wrapped.
        state: The Trainer's state.

    Raises:
        ValueError: If FSDP1 has sharded the model; if several ranks look for the micro-batch that fits: they
            agree on it before the attack, whose memory one of them alone may lack.
    """
    if state.auto_microbatching and dist.get_world_size() > 1:
        raise ValueError(
            "separate_backward=True with device_train_microbatch_size='auto' on several ranks, which could "
            "not agree on a failure inside of the attack: give the micro-batch as a number"
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "separate_backward=True under FSDP1, with which it was never run: leave it out, or train with "
            "FSDP2 or DDP"
        )


class HeldBack:
    """Keeps DDP from preparing an exchange of gradients in one forward: its backward is not the last."""

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []

    def hold(self, model: nn.Module) -> None:
        """Before the clean forward; what the Trainer has decided holds again when that ends or fails."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if not isinstance(model, DistributedDataParallel):
            return
        decided, waiting = model.require_backward_grad_sync, True

        def enter(module: nn.Module, args: Any) -> None:
            if waiting:
                module.require_backward_grad_sync = False  # type: ignore[assignment]

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal waiting
            if waiting:  # the adversarial pass comes here, too
                module.require_backward_grad_sync, waiting = decided, False  # type: ignore[assignment]

        self._hooks = [
            model.register_forward_pre_hook(enter),
            model.register_forward_hook(leave, always_call=True),
        ]


def touching(total: Tensor, model: nn.Module) -> Tensor:
    """A loss whose backward reaches every trained parameter, with zero where it did not.

    DDP waits for all of them, and the second backward leaves out what only the clean pass uses.
    """
    return _Touch.apply(total, *(parameter for parameter in model.parameters() if parameter.requires_grad))


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(parameter.shape, parameter.dtype, parameter.device) for parameter in parameters]
        return total.clone()  # the Trainer changes it in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        zeros = (torch.zeros((), dtype=t, device=d).expand(shape) for shape, t, d in ctx.like)
        return gradient, *zeros
