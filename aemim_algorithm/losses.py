"""Distances between features, the adversarial losses of Eq. 7, and the reduction of a model's loss.

Each distance returns one value for each sample, summed over tokens and computed in at least float32: the
sign of the gradient ignores the scale of a loss, but a mean over thousands of features underflows in fp16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from aemim_algorithm.attack import at_least_float32

__all__ = ["DISTANCES", "kl_divergence", "l2_distance", "num_tokens", "total_loss"]


def l2_distance(features: Tensor, reference: Tensor, dim: int = -1) -> Tensor:
    """Squared Euclidean distance, summed over tokens.

    The square has the same maximiser as the norm, and a gradient where the distance is zero.

    Args:
        features: Adversarial features, shape (batch, tokens, dim) or (batch, channels, ...).
        reference: Clean features, the same shape.
        dim: Unused: the sum runs over all of them.

    Returns:
        Shape (batch,), float32 or wider.
    """
    return (at_least_float32(features) - at_least_float32(reference)).square().flatten(1).sum(dim=1)


def kl_divergence(features: Tensor, reference: Tensor, dim: int = -1) -> Tensor:
    """KL(reference ‖ features) of the softmax over each token's features, summed over tokens.

    Args:
        features: Adversarial features, shape (batch, tokens, dim), or a map such as
            (batch, channels, height, width).
        reference: Clean features, the same shape.
        dim: Which dimension holds a token's features.

    Returns:
        Shape (batch,), float32 or wider.
    """
    log_probability = F.log_softmax(at_least_float32(features), dim=dim)
    log_reference = F.log_softmax(at_least_float32(reference), dim=dim)
    divergence = F.kl_div(log_probability, log_reference, reduction="none", log_target=True)
    return divergence.flatten(1).sum(dim=1)


def num_tokens(features: Tensor, dim: int = -1) -> int:
    """Tokens of one sample: what turns a summed distance into the paper's mean over tokens."""
    return features[0].numel() // features.shape[dim]


def total_loss(loss: Any) -> Tensor:
    """Reduce what ``ComposerModel.loss`` may return to one scalar, as Composer's Trainer does.

    Args:
        loss: A tensor, a sequence of tensors (summed), or a dict: its ``"total"``, else the sum.

    Returns:
        Scalar.
    """
    if isinstance(loss, Mapping):
        loss = loss["total"] if "total" in loss else tuple(loss.values())
    parts = loss if isinstance(loss, list | tuple) else (loss,)
    return torch.stack([part.mean() for part in parts]).sum()


DISTANCES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "l2": l2_distance,
    "kl": kl_divergence,
}
"""Feature distances by the name that ``AEMIM(adversarial_loss=...)`` takes."""
