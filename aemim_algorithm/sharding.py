"""What FSDP and DDP must know of passes that are not the model's own forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

__all__ = ["gathering", "keep_images_exact", "make_fsdp_unit", "require_one_synchronisation", "unwrapped"]

_GATHERING = "_aemim_encoder"


def make_fsdp_unit(model: nn.Module, encoder: nn.Module) -> None:
    """Let Composer give the encoder an FSDP unit of its own; before it wraps the model.

    So its call gathers its parameters, whatever the units around it did when the model's forward ended.
    Composer asks each child of a model, by its ``fsdp_wrap_fn``, about the modules inside; the children
    are units anyway.

    Args:
        model: The model, unwrapped.
        encoder: The encoder, or the module that its method belongs to.
    """
    for child in model.children():
        if child is not encoder and any(module is encoder for module in child.modules()):
            inner: Any = getattr(child, "fsdp_wrap_fn", None)
            if not isinstance(inner, partial) or inner.func is not _is_unit:
                child.fsdp_wrap_fn = partial(_is_unit, encoder, inner)  # type: ignore[assignment]


def gathering(model: nn.Module, owner: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that gathers its module's parameters, as FSDP does only for a module's forward.

    Args:
        model: The model as it trains, wrapped.
        owner: The module that the method belongs to.
        method: The method, bound.

    Returns:
        The same method if nothing of the model is sharded, else one that gathers first.

    Raises:
        ValueError: If FSDP1 has sharded the model: it has no such methods.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            f"the encoder {getattr(method, '__name__', method)!r} is a method, for which FSDP1 gathers no "
            "parameters: pass AEMIM(encoder=...) a module, or train with FSDP2 or DDP"
        )
    if not isinstance(owner, FSDPModule):
        return method
    # Under another name: the model's own calls of the method are inside of a forward, which gathers already.
    object.__setattr__(owner, _GATHERING, method)
    register_fsdp_forward_method(owner, _GATHERING)
    return getattr(owner, _GATHERING)


def keep_images_exact(model: nn.Module, encoder: nn.Module, *, also_inside: bool) -> None:
    """Let images reach the encoder as the batch has them, not rounded to the parameters' precision.

    FSDP casts what its units are called with. In bfloat16 an attacked image would leave the ball: by 14%
    of a budget of 2/255 where this was measured.

    Args:
        model: The model as it trains, wrapped.
        encoder: The encoder, or the module that its method belongs to.
        also_inside: Whether images are taken inside of the module's own forward, as a method's are.
    """
    for unit in model.modules():
        if not any(part is encoder for part in unit.modules()):
            continue
        if isinstance(unit, FSDPModule) and (also_inside or unit is not encoder):
            state = unit._get_fsdp_state()
            state._mp_policy = replace(state._mp_policy, cast_forward_inputs=False)
        elif isinstance(unit, FullyShardedDataParallel):  # autocast has the first layer's input cast
            unit.mixed_precision = replace(
                unit.mixed_precision, cast_forward_inputs=False, cast_root_forward_inputs=False
            )


def require_one_synchronisation(model: nn.Module) -> None:
    """Refuse DDP that takes parameters which the clean forward leaves unused for ready.

    The adversarial copies are such: DDP would exchange them before their gradients are there.

    Args:
        model: The model as it trains, inside of its micro-batch.

    Raises:
        ValueError: If DDP looks for unused parameters and exchanges gradients during backward.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    if model.find_unused_parameters and model.require_backward_grad_sync:
        raise ValueError(
            "an algorithm beside AEMIM makes DDP look for unused parameters, such as the adversarial copies "
            "are for the clean forward: pass Trainer(ddp_sync_strategy='forced_sync')"
        )


def unwrapped(model: Any) -> Any:
    """The model inside of DDP: DDP's own forward must run once a step, other passes go to it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _is_unit(encoder: nn.Module, inner: Any, module: nn.Module) -> Any:
    return True if module is encoder else inner is not None and inner(module)
