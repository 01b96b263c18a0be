"""FLOPs of a training step: counted as it runs, and the least that Algorithm 1 can do with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from training import BARE, METHODS, Settings, Training, build, random_batch

from aemim_algorithm.recipes.estimate import step_flops

__all__ = ["NAIVE", "bound_flops", "counted_flops", "flops_of"]

NAIVE = "naive"


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of matrix products; a multiply-add is two.

    torch's own ``FlopCounterMode`` hooks every module call to tell modules apart, and these hooks
    refuse a gradient with respect to the image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator and add what torch's registry of formulas says of it."""
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops_of(run: Callable[[], Any]) -> int:
    """FLOPs of a call; attention as explicit products, since the CPU's fused kernel has no formula."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
        run()
    return counter.total


def counted_flops(settings: Settings, methods: Sequence[str]) -> dict[str, float]:
    """FLOPs per image of each method's forward and backward, counted as they run."""
    return {
        method: flops_of(Training(method, settings).backward) / settings.micro_batch for method in methods
    }


def bound_flops(settings: Settings, methods: Sequence[str]) -> dict[str, float]:
    """FLOPs per image that Algorithm 1 needs at least, from counts of its single passes.

    Returns:
        By method, with ``"AEMIM"`` among them, and ``"naive"``: AEMIM with a second clean encoder pass for
        its reference features.
    """
    settings = replace(settings, device="meta")  # nothing has to be computed
    model = build(settings)
    batch = random_batch(model, settings)
    makers = {name: METHODS[BARE.get(name, name)] for name in (*methods, "AEMIM")}
    with sdpa_kernel(SDPBackend.MATH):
        bound = {name: step_flops(model, batch, make()) for name, make in makers.items()}
    bound[NAIVE] = bound["AEMIM"] + encoder_flops(model, batch)
    return {name: flops / settings.micro_batch for name, flops in bound.items()}


def encoder_flops(model: ComposerModel, batch: tuple[Tensor, Tensor]) -> int:
    """FLOPs of the encoder's part in a forward pass."""
    counter = FlopCounter()

    def enter(module: nn.Module, args: Any) -> None:
        counter.__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        counter.__exit__(None, None, None)

    encoder = model.get_submodule("encoder")
    hooks = [encoder.register_forward_pre_hook(enter), encoder.register_forward_hook(leave)]
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return counter.total
