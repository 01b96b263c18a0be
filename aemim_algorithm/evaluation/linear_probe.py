"""Linear probe: multinomial logistic regression on frozen features, solved to its optimum.

The objective is strictly convex in the weights, so there is one answer, and neither a learning
rate nor a seed can change it. That is why this is full-batch L-BFGS in float64 and no SGD. All
features are in memory, so it is meant for up to some hundred thousand images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aemim_algorithm.evaluation.features import check_features

__all__ = ["fit_logistic_regression", "linear_probe_accuracy"]


def fit_logistic_regression(
    features: Tensor,
    labels: Tensor,
    *,
    weight_decay: float,
    max_iterations: int = 500,
    tolerance: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Minimise mean cross-entropy + weight_decay / 2 · ‖weight‖²; the bias is not decayed.

    Args:
        features: shape (n, dim).
        labels: shape (n,), integers from 0; there are `labels.max() + 1` classes.
        weight_decay: > 0, so that the optimum exists even if the classes are separable.
        max_iterations: of L-BFGS; it stops here even if the tolerance is not reached.
        tolerance: the largest gradient entry at which it stops.

    Returns:
        weight, shape (classes, dim), and bias, shape (classes,), float64.

    Raises:
        ValueError: if an argument is out of range or the features do not fit the labels.
    """
    check_features(features, labels, split="train")
    if not weight_decay > 0:
        raise ValueError(f"got weight_decay={weight_decay}; expected > 0")
    features = features.double()
    classes = int(labels.max()) + 1
    weight = features.new_zeros(classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=0,  # a small step is no sign of the optimum; a small gradient is
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels)
        loss = loss + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return weight.detach(), bias.detach()


def linear_probe_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    weight_decay: float = 1e-3,
) -> float:
    """Top-1 accuracy of a logistic regression on standardised features.

    Args:
        train_features: shape (n, dim), float.
        train_labels: shape (n,), integers from 0.
        test_features: shape (m, dim), float.
        test_labels: shape (m,), integers from 0.
        weight_decay: > 0, see `fit_logistic_regression`; a fixed value, chosen on no test set.

    Returns:
        Percent of the test samples that are classified right.

    Raises:
        ValueError: if the features do not fit each other or an argument is out of range.
    """
    check_features(train_features, train_labels, split="train")
    check_features(test_features, test_labels, split="test")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"got train features of {train_features.shape[1]} and test features of "
            f"{test_features.shape[1]} dimensions; expected one encoder's features"
        )
    train_features, test_features = _standardise(train_features, test_features)
    weight, bias = fit_logistic_regression(train_features, train_labels, weight_decay=weight_decay)
    predictions = F.linear(test_features, weight, bias).argmax(dim=1)
    return 100.0 * (predictions == test_labels).double().mean().item()


def _standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Mean 0 and deviation 1 on the training features; the test features follow."""
    train, test = train.double(), test.double()
    mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0)
    # A dead feature says nothing: leave it at 0 instead of dividing by 0.
    deviation = torch.where(deviation > 1e-12, deviation, torch.ones_like(deviation))
    return (train - mean) / deviation, (test - mean) / deviation
