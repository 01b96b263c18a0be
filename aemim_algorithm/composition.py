"""What AEMIM does for other algorithms of Composer that copy, replace or freeze layers.

Composer calls algorithms in the order of its list, so without this the result would depend on it: a
copy of the model that is made before the adapters lacks them, and a norm that is replaced after
them loses its adversarial twin without a word.
"""

from __future__ import annotations

from functools import partial

import torch
from composer.algorithms import (
    EMA,
    SWA,
    GhostBatchNorm,
    LayerFreezing,
    LowPrecisionGroupNorm,
    LowPrecisionLayerNorm,
)
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import nn
from torch.optim import Optimizer

from aemim_algorithm.adapters import adapters_of

__all__ = ["copy_again", "freeze_twins", "prepare_compiled", "prepare_for"]

_COPIES_THE_MODEL = (EMA, SWA)
_REPLACES_NORMS_LAST = (LowPrecisionLayerNorm, LowPrecisionGroupNorm)
_REPLACES_NORMS = (GhostBatchNorm,)


def prepare_for(aemim: Algorithm, state: State, logger: Logger) -> None:
    """Before the adapters: let algorithms that replace norms go first, refuse what cannot be right.

    Composer runs ``LowPrecisionLayerNorm`` after all others, where it would replace the adapters by
    stock layers: it is applied here instead, and its own turn is skipped.

    Raises:
        ValueError: If there are two AEMIMs, or an algorithm would replace the adapters.
    """
    others = [algorithm for algorithm in state.algorithms if algorithm is not aemim]
    if any(isinstance(other, type(aemim)) for other in others):
        raise ValueError(
            "there are two AEMIM algorithms: the second would attack what the first made; pass one"
        )
    position = state.algorithms.index(aemim)
    for other in state.algorithms[position:]:
        if isinstance(other, _REPLACES_NORMS):
            raise ValueError(
                f"{type(other).__name__} comes after AEMIM and would replace its adapters: pass "
                f"algorithms=[{type(other).__name__}(...), AEMIM(...)]"
            )
    for other in others:
        if isinstance(other, _REPLACES_NORMS_LAST):
            if not adapters_of(state.model):
                type(other).apply(other, Event.INIT, state, logger)  # type: ignore[arg-type]
            other.apply = partial(_skip_once, other)  # type: ignore[method-assign]


def copy_again(aemim: Algorithm, state: State, logger: Logger) -> None:
    """After the adapters: whoever has copied the model without them copies it again."""
    for other in state.algorithms[: state.algorithms.index(aemim)]:
        if isinstance(other, _COPIES_THE_MODEL):
            other.apply(Event.INIT, state, logger)


def freeze_twins(state: State) -> None:
    """What ``LayerFreezing`` froze of an adapter is frozen as a whole.

    It freezes modules without children: of a dual norm that is the adversarial copy alone.
    """
    if not any(isinstance(algorithm, LayerFreezing) for algorithm in state.algorithms):
        return
    for adapter in adapters_of(state.model):
        for clean, copied in adapter.twins():
            if not (clean.requires_grad and copied.requires_grad):
                for parameter in (clean, copied):
                    parameter.requires_grad = False
                    _leave_optimizers(parameter, state.optimizers)


def prepare_compiled(model: nn.Module, *, checkpointed: bool) -> None:
    """Make compiled code draw what eager code draws: masks that are drawn inside must repeat.

    The attack calls the encoder outside of the compiled forward. Inductor's own generator would give
    it other masks, silently.

    Args:
        model: The model, unwrapped, compiled or not.
        checkpointed: Whether activations are recomputed in backward.

    Raises:
        ValueError: If it is compiled and recomputes: dynamo takes no contexts for that.
    """
    if not hasattr(model.forward, "_torchdynamo_orig_callable"):
        return
    if checkpointed:
        raise ValueError(
            "activation checkpointing in a compiled model: its recomputation could not be given the right "
            "adapters; leave out compile_config, or the checkpointing"
        )
    torch._inductor.config.fallback_random = True


def _leave_optimizers(parameter: nn.Parameter, optimizers: tuple[Optimizer, ...]) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [other for other in group["params"] if other is not parameter]


def _skip_once(algorithm: Algorithm, event: Event, state: State, logger: Logger) -> None:
    """The turn of an algorithm that was applied early; in another Trainer it is itself again."""
    del algorithm.apply  # the one set on the object; its class has its own
