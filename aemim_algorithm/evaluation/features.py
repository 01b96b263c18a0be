"""Features of a frozen encoder: the average of its patch tokens, or its class token.

The average is the default: masked image modeling puts no loss on the class token, so what stands there is
not trained for anything, while the patch tokens are. The MAE paper's linear probe takes the class token.

Cost: one unmasked encoder forward per image, without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["Pooling", "check_features", "evaluating", "extract_features"]

Batch = tuple[Tensor, Tensor]
Pooling = Literal["average", "class"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode within the block; afterwards every submodule has the mode that it had before.

    `module.train()` would not do: it would also wake the layers that the user has frozen.
    """
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def extract_features(
    encoders: Mapping[str, nn.Module],
    loader: Iterable[Batch],
    *,
    normalize: Callable[[Batch], Batch],
    device: torch.device | str,
    pooling: Pooling = "average",
) -> tuple[dict[str, Tensor], Tensor]:
    """Run frozen encoders over a data set, which is read once.

    Args:
        encoders: By name; each maps normalised images, shape (batch, 3, height, width), to tokens,
            shape (batch, prefix + patches, dim), after its final normalization; it has to be on
            ``device``. Its ``num_prefix_tokens`` (timm's name; 1 where it is missing) says how many
            tokens are no patches.
        loader: Yields (images, labels), images uint8 of shape (batch, 3, height, width).
        normalize: Maps a batch of the loader, images on ``device``, to one whose images the encoders
            take: :class:`~aemim_algorithm.data.transforms.Normalize`.
        device: Where the encoders run.
        pooling: ``"average"`` of the patch tokens, or the ``"class"`` token, which is the first.

    Returns:
        Features of each encoder, shape (n, dim), float32, and labels, shape (n,), int64, all on the
        CPU and in the loader's order.

    Raises:
        ValueError: If an encoder is on another device, returns no tokens or has no class token to take, or
            the loader is empty.
    """
    device = torch.device(device)
    features: dict[str, list[Tensor]] = {name: [] for name in encoders}
    labels: list[Tensor] = []
    with ExitStack() as modes, torch.no_grad():
        for encoder in encoders.values():
            _check_device(encoder, device)
            modes.enter_context(evaluating(encoder))
        for images, targets in loader:
            normalised, _ = normalize((images.to(device), targets))
            for name, encoder in encoders.items():
                features[name].append(_pool(encoder, encoder(normalised), pooling).cpu())
            labels.append(torch.as_tensor(targets, dtype=torch.int64))
    if not labels:
        raise ValueError("got a loader without batches; expected at least one image to evaluate on")
    return {name: torch.cat(parts) for name, parts in features.items()}, torch.cat(labels)


def check_features(features: Tensor, labels: Tensor, *, split: str) -> None:
    """Refuse what no accuracy can be computed from.

    Args:
        features: shape (n, dim).
        labels: shape (n,), integers from 0.
        split: what the message calls them, "train" or "test".

    Raises:
        ValueError: if shapes do not fit, there is no sample, a feature is not finite or a label
            is negative.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(features):
        raise ValueError(
            f"got {split} features of shape {tuple(features.shape)} and labels of shape "
            f"{tuple(labels.shape)}; expected (n, dim) and (n,) with n > 0"
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"got {split} features that are not finite; has the pre-training diverged?")
    if labels.is_floating_point() or int(labels.min()) < 0:
        raise ValueError(f"got {split} labels {labels.dtype}; expected integers from 0")


def _pool(encoder: nn.Module, tokens: Tensor, pooling: Pooling) -> Tensor:
    prefix = int(getattr(encoder, "num_prefix_tokens", 1))
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[1] <= prefix:
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(
            f"got {got} from the encoder; expected tokens of shape (batch, {prefix} + patches, dim)"
        )
    if pooling == "average":
        return tokens[:, prefix:].float().mean(dim=1)
    if prefix == 0:
        raise ValueError("pooling=class: the encoder has no class token; expected pooling=average")
    return tokens[:, 0].float()


def _check_device(encoder: nn.Module, device: torch.device) -> None:
    found = {parameter.device.type for parameter in encoder.parameters()}
    if found - {device.type}:
        raise ValueError(
            f"got an encoder on {sorted(found)}; expected it on {device.type!r}: "
            "move it, or pass the device that it is on"
        )
