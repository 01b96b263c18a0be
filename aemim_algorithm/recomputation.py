"""Activation checkpointing: what is computed again in backward must see what the forward saw.

By then the adapters are clean again and the buffers the model's own: a block of the adversarial pass would be
recomputed with the clean norms, and its gradients were silently wrong (relative error 0.86 where this was
measured). So each checkpointed module notes mode and buffers as it runs forward, and gets them back for its
recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils.checkpoint import checkpoint

from aemim_algorithm.adapters import adapters_of

__all__ = ["repeat_what_forward_saw"]

_Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

_WRAPPER, _HUGGING_FACE = "checkpoint_fn", "_gradient_checkpointing_func"  # attributes that hold the function


def repeat_what_forward_saw(model: nn.Module, encoder: nn.Module | None) -> int:
    """Make every checkpointed module of a model recompute what it computed; twice is once.

    Serves torch's ``CheckpointWrapper``, which Composer's ``activation_checkpointing`` uses, and Hugging
    Face's ``gradient_checkpointing_enable``, both without reentrance.

    Args:
        model: Any model.
        encoder: The module where adversarial images enter; it must not be recomputed itself.

    Returns:
        Number of checkpointed modules.

    Raises:
        ValueError: If a module is checkpointed in another way, or the encoder is part of one.
    """
    count = 0
    for name, module in model.named_modules():
        attribute = _attribute(name, module)
        if attribute is None:
            continue
        recomputed = module if attribute == _WRAPPER or _is_layer(module) else None
        if recomputed is not None and any(part is encoder for part in recomputed.modules()):
            raise ValueError(
                f"{_place(name)} checkpoints the encoder as a whole: its recomputation would not see the "
                "adversarial images; checkpoint the encoder's blocks instead"
            )
        setattr(module, attribute, _repeating(name, module, getattr(module, attribute)))
        count += 1
    return count


def _attribute(name: str, module: nn.Module) -> str | None:
    """Where a module that is checkpointed keeps the function that does it."""
    if isinstance(module, CheckpointWrapper):
        return _WRAPPER
    if getattr(module, "grad_checkpointing", False) is True:
        raise ValueError(
            f"{_place(name)} uses timm's own activation checkpointing, whose recomputation would use the "
            "wrong adapters: call set_grad_checkpointing(False), and use Composer's activation_checkpointing "
            "or torch's checkpoint_wrapper on its blocks"
        )
    if getattr(module, "gradient_checkpointing", False) is not True:
        return None
    if not hasattr(module, _HUGGING_FACE):
        raise ValueError(
            f"{_place(name)} sets gradient_checkpointing and has no {_HUGGING_FACE}: AEMIM cannot make its "
            "recomputation use the right adapters; turn it off, or use torch's checkpoint_wrapper"
        )
    return _HUGGING_FACE


def _repeating(name: str, module: nn.Module, function: Any) -> Callable[..., Any]:
    options = function.keywords if isinstance(function, partial) else {}
    inner = options.get("context_fn")
    if isinstance(inner, partial) and inner.func is _contexts:
        return function  # served already
    stock = function.func if isinstance(function, partial) else function
    if stock is not checkpoint:
        raise ValueError(
            f"{_place(name)} is checkpointed by {getattr(stock, '__name__', stock)!r}, not by torch: AEMIM "
            "cannot make its recomputation use the right adapters; leave out checkpoint_fn"
        )
    if options.get("use_reentrant", True):
        raise ValueError(
            f"{_place(name)} is checkpointed with reentrance, through which no gradient reaches the attacked "
            "images: use CheckpointImpl.NO_REENTRANT, with Composer's FSDP1 "
            "activation_checkpointing_reentrant=False, with Hugging Face "
            'gradient_checkpointing_enable({"use_reentrant": False})'
        )
    return partial(function, context_fn=partial(_contexts, module, inner))


def _contexts(module: nn.Module, inner: Callable[[], _Contexts] | None) -> _Contexts:
    """The contexts of a forward and of its recomputation; called as the forward begins."""
    forward, recomputation = (nullcontext(), nullcontext()) if inner is None else inner()
    modes = [(adapter, adapter.adversarial_mode) for adapter in adapters_of(module)]
    buffers = [(owner, dict(owner._buffers)) for owner in module.modules() if owner._buffers]
    return forward, _both(_seen(modes, buffers), recomputation)


@contextmanager
def _seen(modes: list[Any], buffers: list[Any]) -> Iterator[None]:
    present_modes = [(adapter, adapter.adversarial_mode) for adapter, _ in modes]
    present_buffers = [(owner, dict(owner._buffers)) for owner, _ in buffers]
    _set(modes, buffers)
    try:
        yield
    finally:
        _set(present_modes, present_buffers)


@contextmanager
def _both(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _set(modes: list[Any], buffers: list[Any]) -> None:
    for adapter, mode in modes:
        adapter.adversarial_mode = mode
    for owner, values in buffers:
        owner._buffers.update(values)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module of Hugging Face is recomputed itself; others hand the function to their layers."""
    return any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)


def _place(name: str) -> str:
    return repr(name.replace("_checkpoint_wrapped_module.", "")) if name else "the model"
