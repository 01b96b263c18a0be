"""Adapters: the few parameters that clean and adversarial images do not share (AdvProp, Xie et al. 2020).

An adapter is a module that owns a second set of its parameters and uses one of the two, by a plain
attribute that :func:`adversarial_mode` flips. The clean parameters keep their stock state-dict keys
(``blocks.0.norm1.weight``), the copies have ``adversarial`` in theirs
(``blocks.0.norm1.adversarial.weight``): dropping these keys gives the stock model back.

The module itself stays, only its class becomes a subclass, as FSDP2 does it: hooks, references from
elsewhere and ``isinstance`` checks keep working. (Composer's ``module_surgery`` puts a new module in
its place, and refuses optimizers with several parameter groups unless parameters are removed.)
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from aemim_algorithm.validation import require_choice

__all__ = [
    "ADAPTERS",
    "Adapter",
    "DualClassToken",
    "DualNorm",
    "adapters_of",
    "adversarial_mode",
    "adversarial_parameters",
    "apply_adapters",
    "copies_of_buffers",
    "preserved_buffers",
    "remove_adapters",
    "require_same_adapters",
]

ADAPTERS = ("norm", "cls_token", "both", "none")

_TORCH_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_NORM_NAME = re.compile(r"Norm(?!ed|al)|GRN")


class Adapter(nn.Module):
    """Mixin of a module with two sets of parameters; :attr:`adversarial_mode` says which is used."""

    adversarial_mode: bool = False
    adversarial: nn.Module
    stock_class: ClassVar[type[nn.Module]]

    def twins(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Each clean parameter with its adversarial copy."""
        raise NotImplementedError

    def drop_copy(self) -> None:
        """Delete the adversarial copy."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so pickle cannot find it by name.
        kind = DualNorm if isinstance(self, DualNorm) else DualClassToken
        return _new, (kind, self.stock_class), self.__getstate__()


class DualNorm(Adapter):
    """A normalization layer with an adversarial copy of itself, running statistics included."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Normalise with the copy in adversarial mode, else as the stock layer does."""
        if self.adversarial_mode:
            return self.adversarial(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def twins(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Each clean parameter with its adversarial copy."""
        copies = dict(self.adversarial.named_parameters())
        for name, parameter in self.named_parameters():
            if name in copies:
                yield parameter, copies[name]

    def drop_copy(self) -> None:
        """Delete the adversarial copy."""
        del self.adversarial


class DualClassToken(Adapter):
    """A module with two class tokens: reading ``cls_token`` gives the one of the current mode."""

    @property
    def cls_token(self) -> Tensor | None:
        """The class token of the current mode."""
        name = "adversarial_cls_token" if self.adversarial_mode else "cls_token"
        return self._parameters[name]

    def twins(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """The clean token with its adversarial copy."""
        clean, adversarial = (self._parameters[n] for n in ("cls_token", "adversarial_cls_token"))
        if clean is not None and adversarial is not None:
            yield clean, adversarial

    def drop_copy(self) -> None:
        """Delete the adversarial copy."""
        del self.adversarial_cls_token


def apply_adapters(
    model: nn.Module,
    adapter: str = "norm",
    optimizers: Optimizer | Iterable[Optimizer] | None = None,
) -> int:
    """Give a model adversarial adapters, in place; what has one already keeps it.

    The copies start equal to the clean parameters. Each joins the optimizer's parameter group of the
    parameter it twins, so it has the same learning rate and weight decay.

    Args:
        model: Any model.
        adapter: ``"norm"`` for every normalization layer, ``"cls_token"`` for the class token,
            ``"both"``, or ``"none"`` for nothing (paper, Table 8c).
        optimizers: The optimizers that train ``model``, if they exist already.

    Returns:
        Number of adapters of this kind that the model has now.

    Raises:
        ValueError: If ``adapter`` is unknown, or the model has nothing of this kind to adapt.
    """
    require_choice("adapter", adapter, ADAPTERS)
    copies = _modules_of_copies(model)
    modules = [module for module in model.modules() if module not in copies]
    norms = [module for module in modules if _is_norm(module)] if adapter in ("norm", "both") else []
    tokens = [m for m in modules if _has_class_token(m)] if adapter in ("cls_token", "both") else []
    if adapter in ("norm", "both") and not norms:
        raise ValueError(_nothing_to_adapt(model, adapter, "normalization layer", "cls_token"))
    if adapter in ("cls_token", "both") and not tokens:
        raise ValueError(_nothing_to_adapt(model, adapter, "cls_token parameter", "norm"))
    for module in norms:
        _become_adapter(module, DualNorm)
    for module in tokens:
        _become_adapter(module, DualClassToken)
    for optimizer in _as_tuple(optimizers):
        _join_optimizer(optimizer, adapters_of(model))
    return len(norms) + len(tokens)


def remove_adapters(model: nn.Module) -> int:
    """Undo :func:`apply_adapters`, in place: the clean parameters stay, the copies go.

    Args:
        model: A model, with or without adapters.

    Returns:
        Number of adapters removed.
    """
    adapters = adapters_of(model)
    for module in adapters:
        module.drop_copy()
        module.__dict__.pop("adversarial_mode", None)
        module.__class__ = module.stock_class  # type: ignore[assignment]
    return len(adapters)


@contextmanager
def adversarial_mode(model: nn.Module) -> Iterator[None]:
    """Make every adapter of ``model`` use its adversarial copy inside the ``with`` block.

    The previous mode comes back on any exit: left on, a clean image would silently train the copies.
    """
    adapters = adapters_of(model)
    previous = [adapter.adversarial_mode for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.adversarial_mode = True
        yield
    finally:
        for adapter, mode in zip(adapters, previous, strict=True):
            adapter.adversarial_mode = mode


def copies_of_buffers(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Every buffer of a model with a copy of its present values."""
    return [(buffer, buffer.clone()) for buffer in model.buffers()]


@contextmanager
def preserved_buffers(model: nn.Module, *, clean_only: bool = False) -> Iterator[None]:
    """Keep every buffer, such as running statistics, as it is, whatever passes inside.

    Args:
        model: Any model.
        clean_only: Whether the adversarial copies may go on collecting theirs.
    """
    owners = [module for module in model.modules() if module._buffers]
    if clean_only:
        copies = _modules_of_copies(model)
        owners = [owner for owner in owners if owner not in copies]
    kept = [dict(owner._buffers) for owner in owners]
    try:
        for owner in owners:
            # Other tensors, not other values: autograd may have saved these ones.
            owner._buffers.update({k: b.clone() for k, b in owner._buffers.items() if b is not None})
        yield
    finally:
        for owner, buffers in zip(owners, kept, strict=True):
            owner._buffers.update(buffers)


def require_same_adapters(model: nn.Module, adapter: str) -> None:
    """Refuse to go on with a model that has adapters of another kind; one without any is right.

    Raises:
        ValueError: If ``adapter`` is not what the model was adapted with.
    """
    present = {type(module).__mro__[1] for module in adapters_of(model)}
    wanted = {"norm": {DualNorm}, "cls_token": {DualClassToken}, "both": {DualNorm, DualClassToken}}
    if present and present != wanted.get(adapter):
        raise ValueError(
            f"adapter={adapter!r}, but {type(model).__name__} has adapters of another kind already: pass "
            "the adapter that it was trained with, or call remove_adapters(model) first"
        )


def adapters_of(model: nn.Module) -> list[Adapter]:
    """Every adapter of a model, in the order of ``model.modules()``."""
    return [module for module in model.modules() if isinstance(module, Adapter)]


def adversarial_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every adversarial copy of a model, in the order of its adapters."""
    return [copy for adapter in adapters_of(model) for _, copy in adapter.twins()]


def _nothing_to_adapt(model: nn.Module, adapter: str, what: str, other: str) -> str:
    return (
        f"adapter={adapter!r} found nothing to adapt: {type(model).__name__} has no "
        f"trainable {what}; pass adapter={other!r} or adapter='none'"
    )


def _modules_of_copies(model: nn.Module) -> set[nn.Module]:
    duals = [module for module in model.modules() if isinstance(module, DualNorm)]
    return {module for dual in duals for module in dual.adversarial.modules()}


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, DualNorm):
        return True
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return False  # of a frozen teacher or tokenizer
    # A leaf of its own making: timm's RmsNorm, GlobalResponseNorm, a library's LlamaRMSNorm.
    leaf = not any(module.children()) and _NORM_NAME.search(type(module).__name__) is not None
    if isinstance(module, _TORCH_NORMS):
        return bool(parameters) or any(True for _ in module.buffers())
    return leaf and bool(parameters)


def _has_class_token(module: nn.Module) -> bool:
    token = module._parameters.get("cls_token")
    return isinstance(module, DualClassToken) or (token is not None and token.requires_grad)


def _become_adapter(module: nn.Module, kind: type[Adapter]) -> None:
    if isinstance(module, kind):
        return
    if kind is DualNorm:
        copied = copy.deepcopy(module)
        for hooks in (copied._forward_hooks, copied._forward_pre_hooks, copied._backward_hooks):
            hooks.clear()  # the layer's own hooks run already, around both
        module.adversarial = copied
    else:
        token = copy.deepcopy(module._parameters["cls_token"])
        module.register_parameter("adversarial_cls_token", token)
    module.__class__ = _adapter_class(kind, type(module))  # type: ignore[arg-type]


@cache
def _adapter_class(kind: type[Adapter], stock_class: type[nn.Module]) -> type[nn.Module]:
    name = f"{kind.__name__}_{stock_class.__name__}"
    return type(name, (kind, stock_class), {"stock_class": stock_class})


def _new(kind: type[Adapter], stock_class: type[nn.Module]) -> nn.Module:
    cls = _adapter_class(kind, stock_class)  # type: ignore[arg-type]
    return cls.__new__(cls)


def _join_optimizer(optimizer: Optimizer, adapters: list[Adapter]) -> None:
    """Append each copy to the group of its twin, unless it is there already."""
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for adapter in adapters:
        for parameter, twin in adapter.twins():
            if id(parameter) in group_of and id(twin) not in group_of:
                group_of[id(parameter)]["params"].append(twin)


def _as_tuple(optimizers: Optimizer | Iterable[Optimizer] | None) -> tuple[Optimizer, ...]:
    if optimizers is None:
        return ()
    return (optimizers,) if isinstance(optimizers, torch.optim.Optimizer) else tuple(optimizers)
