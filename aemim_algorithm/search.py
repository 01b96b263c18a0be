"""Finding the encoder: the submodule of a model that turns images into features."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["candidates", "find_encoder", "resolve_encoder"]

_PATCH_EMBEDDING = re.compile(r"stem|embed|patch")
_METHODS = ("forward_encoder", "forward_features", "encode")


def resolve_encoder(model: nn.Module, path: str) -> tuple[nn.Module, str, Any]:
    """What a dotted path names: the module that owns it, its name there, and the module or method.

    Raises:
        ValueError: If it names nothing that can be called.
    """
    owner_path, _, name = path.rpartition(".")
    try:
        owner = model.get_submodule(owner_path)
        encoder = getattr(owner, name)
    except AttributeError:
        encoder = None
    if not callable(encoder):
        raise ValueError(f"encoder={path!r} names nothing in {type(model).__name__}: {_remedy(model)}")
    return owner, name, encoder


def find_encoder(model: nn.Module, *, channels: int = 3) -> str:
    """Find the submodule that turns images into features.

    Looks for a submodule ``encoder``, then for the one that Hugging Face's ``base_model_prefix``
    names; in the model itself, then in the ``model`` or ``module`` that a Composer wrapper holds.
    Then for the one submodule that images can enter: the outermost trainable one, beside others with
    parameters, that holds every convolution with ``channels`` input channels. What is frozen, such
    as a teacher, is no encoder. Of timm's models the encoder is ``forward_features``, which their
    forward calls as well.

    Args:
        model: A masked-image model.
        channels: Channels of its images.

    Returns:
        The dotted path of the encoder.

    Raises:
        ValueError: If there is none; the message says what was searched and lists candidates.
    """
    for wrapper in ("", "model", "module"):
        inner = getattr(model, wrapper, None) if wrapper else model
        for name in ("encoder", getattr(inner, "base_model_prefix", "")):
            named = getattr(inner, name, None) if name else None
            if isinstance(named, nn.Module) and _is_trainable(named):
                return _features_of(named, f"{wrapper}.{name}".lstrip("."))
    path, reason = _receiver_of_images(model, channels)
    if reason:
        raise ValueError(
            f"AEMIM found no encoder in {type(model).__name__}: it has no trainable submodule 'encoder', no "
            f"base_model_prefix (nor has its 'model' or 'module'), and {reason}; {_remedy(model)}"
        )
    return _features_of(model.get_submodule(path), path)


def _receiver_of_images(model: nn.Module, channels: int) -> tuple[str, str]:
    """The path of the submodule that images enter, or a reason why there is none."""
    entrances = [name.split(".") for name, _ in _entrances(model, channels) if name]
    if not entrances:
        return "", f"no convolution takes images of {channels} channels"
    path: list[str] = []
    node = model
    while True:
        trained = {name for name, child in node.named_children() if _is_trainable(child)}
        inside = [name for name in entrances if name[: len(path)] == path and len(name) > len(path)]
        entered = {name[len(path)] for name in inside} & trained
        if len(entered) > 1:
            several = sorted(".".join([*path, name]) for name in entered)
            return "", f"images can enter several submodules ({', '.join(several)})"
        if not entered:
            return "", f"images enter at {'.'.join(path)!r}, which is no encoder but a single layer"
        path += entered
        own = any(p.requires_grad for p in node.parameters(recurse=False))
        node = model.get_submodule(".".join(path))
        if own or len(trained) > 1:  # beside a decoder, a head or tokens: not a mere wrapper
            break
    stem = {id(p) for _, module in _entrances(model, channels) for p in module.parameters()}
    beyond = [p for p in node.parameters() if p.ndim > 1 and id(p) not in stem]
    if not beyond or _PATCH_EMBEDDING.search(path[-1]):
        return "", f"images enter at {'.'.join(path)!r}, which embeds patches only"
    return ".".join(path), ""


def _features_of(module: nn.Module, path: str) -> str:
    stock = getattr(type(module), "stock_class", type(module))  # of a model that is adapted itself
    of_timm = stock.__module__.startswith("timm.models.") and hasattr(module, "forward_features")
    return f"{path}.forward_features" if of_timm else path


def _entrances(model: nn.Module, channels: int) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and module.in_channels == channels:
            yield name, module


def _is_trainable(module: nn.Module) -> bool:
    # A frozen teacher or tokenizer looks at images, too.
    return any(p.requires_grad for p in module.parameters())


def _remedy(model: nn.Module) -> str:
    return (
        "pass AEMIM(encoder=...) the dotted path of the module or method that turns images into "
        f"features; {candidates(model)}"
    )


def candidates(model: nn.Module) -> str:
    """Modules and methods of a model that may be its encoder, for a message."""
    modules = [name for name, _ in model.named_modules() if name and name.count(".") < 2]
    owners = [("", model), *((name, model.get_submodule(name)) for name in modules)]
    methods = [
        f"{name}.{method}".lstrip(".")
        for name, owner in owners
        for method in _METHODS
        if callable(getattr(owner, method, None))
    ]
    found = [*methods, *modules]
    shown = ", ".join(found[:12]) + (", …" if len(found) > 12 else "")
    return f"candidates: {shown or 'none, it has no submodules'}"
