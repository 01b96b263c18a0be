"""What FSDP must know of the encoder, which AEMIM calls outside of the model's forward."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

__all__ = ["is_sharded", "make_fsdp_unit"]


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


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP has any part of a model."""
    return any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())


def _is_unit(encoder: nn.Module, inner: Any, module: nn.Module) -> Any:
    return True if module is encoder else inner is not None and inner(module)
