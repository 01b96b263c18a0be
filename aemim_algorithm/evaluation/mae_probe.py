"""The linear probe of the MAE paper (He et al., arXiv 2111.06377, appendix A.1, "Linear probing").

A batch normalisation without scale and shift, then a linear classifier. LARS, rate 0.1 · batch / 256,
batch 16384, 90 epochs with 10 of warm-up and a cosine to 0, momentum 0.9, no weight decay. The trust
coefficient, 0.001, is that of the LARS paper (You et al., arXiv 1708.03888). The bias is not adapted.

The features are computed once, so there are no random crops and flips: scores differ from the paper's.
And a step of LARS is a share of the weight's length, so the way that the weight can go grows with images ·
epochs · base rate, whatever the batch: the paper's settings, made for 1.28 million images, leave the
classifier unfinished on a few thousand. There, the regression of `linear_probe` is the one to read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from aemim_algorithm.evaluation.features import check_features
from aemim_algorithm.validation import require_integer, require_number

__all__ = ["MaeProbe", "mae_probe_accuracy", "probe_learning_rate"]


@dataclass(frozen=True, kw_only=True)
class MaeProbe:
    """How the classifier is trained; the defaults are the paper's.

    Attributes:
        epochs: Passes over the features.
        warmup_epochs: Of these, those in which the rate rises from 0; fewer than ``epochs``.
        batch_size: Samples of a step; all of them where there are fewer.
        base_learning_rate: At a batch of 256; the rate is this · batch / 256.
        seed: Of the initial weights and of the order of samples, in [0, 2**32).
    """

    epochs: int = 90
    warmup_epochs: int = 10
    batch_size: int = 16384
    base_learning_rate: float = 0.1
    seed: int = 17

    def __post_init__(self) -> None:
        require_integer("epochs", self.epochs, low=1)
        require_integer("warmup_epochs", self.warmup_epochs, low=0)
        require_integer("batch_size", self.batch_size, low=1)
        require_integer("seed", self.seed, low=0)
        require_number("base_learning_rate", self.base_learning_rate, low=0, low_open=True)
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs}: expected fewer than the {self.epochs} epochs"
            )


def mae_probe_accuracy(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, probe: MaeProbe
) -> float:
    """Top-1 accuracy of the probe.

    Args:
        train_features: shape (n, dim), float.
        train_labels: shape (n,), integers from 0.
        test_features: shape (m, dim), float.
        test_labels: shape (m,), integers from 0.
        probe: How to train it.

    Returns:
        Percent of the test samples that are classified right.

    Raises:
        ValueError: If the features do not fit each other.
    """
    check_features(train_features, train_labels, split="train")
    check_features(test_features, test_labels, split="test")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"got train features of {train_features.shape[1]} and test features of "
            f"{test_features.shape[1]} dimensions; expected one encoder's features"
        )
    head = _train(train_features.float(), train_labels, probe)
    with torch.no_grad():
        predictions = head(test_features.float()).argmax(dim=1)
    return 100.0 * (predictions == test_labels).double().mean().item()


def probe_learning_rate(probe: MaeProbe, epoch: float, *, batch_size: int) -> float:
    """The rate at a time: a line from 0, then half a cosine to 0.

    Args:
        probe: The settings.
        epoch: Time, in epochs, with its fraction.
        batch_size: Samples of a step.

    Returns:
        The rate.
    """
    peak = probe.base_learning_rate * batch_size / 256
    if epoch < probe.warmup_epochs:
        return peak * epoch / probe.warmup_epochs
    share = (epoch - probe.warmup_epochs) / (probe.epochs - probe.warmup_epochs)
    return peak * (1 + math.cos(math.pi * share)) / 2


def _train(features: Tensor, labels: Tensor, probe: MaeProbe) -> nn.Module:
    """Train on features; the global generators are left alone. In eval mode when it returns."""
    generator = torch.Generator().manual_seed(probe.seed)
    head = _head(features.shape[1], int(labels.max()) + 1, generator)
    optimizer = _optimizer(head)
    size = min(probe.batch_size, len(features))
    steps = len(features) // size  # the last samples of an epoch that fill no batch are left out, as in MAE
    for epoch in range(probe.epochs):
        order = torch.randperm(len(features), generator=generator)
        for step in range(steps):
            rate = probe_learning_rate(probe, epoch + step / steps, batch_size=size)
            for group in optimizer.param_groups:
                group["lr"] = rate
            chosen = order[step * size : (step + 1) * size]
            optimizer.zero_grad()
            with torch.enable_grad():
                F.cross_entropy(head(features[chosen]), labels[chosen]).backward()
            optimizer.step()
    return head.eval()


def _head(dim: int, classes: int, generator: torch.Generator) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):  # the layer draws an initialisation that is overwritten
        linear = nn.Linear(dim, classes)
    nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), linear).train()


def _optimizer(head: nn.Sequential) -> Lars:
    weight, bias = head[1].weight, head[1].bias
    # Without weight decay, timm's LARS adapts only the groups that ask for it.
    groups = [{"params": [weight], "always_adapt": True}, {"params": [bias], "always_adapt": False}]
    return Lars(groups, lr=0.0, momentum=0.9, weight_decay=0.0, trust_coeff=0.001)
