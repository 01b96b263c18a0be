from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from aemim_algorithm.evaluation import fit_logistic_regression, linear_probe_accuracy


def problem(n: int = 200, *, dim: int = 6, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of unlike scales, labels from a noisy linear rule, the same for every seed."""
    rule = torch.randn(dim, classes, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, dim, generator=generator)
    noise = torch.randn(n, classes, generator=generator)
    labels = (features @ rule + noise).argmax(dim=1)
    return features * torch.logspace(-2, 2, dim) + 5, labels


def objective(flat: Any, x: Any, y: Any, classes: int, weight_decay: float) -> tuple[float, Any]:
    """The objective and its gradient, written in NumPy from the definition."""
    table = flat.reshape(classes, x.shape[1] + 1)
    weight, bias = table[:, :-1], table[:, -1]
    logits = x @ weight.T + bias
    logits = logits - logits.max(axis=1, keepdims=True)
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = np.arange(len(x))
    loss = -np.log(probability[rows, y]).mean() + weight_decay / 2 * (weight**2).sum()
    error = probability.copy()
    error[rows, y] -= 1
    gradient = np.concatenate(
        [error.T @ x / len(x) + weight_decay * weight, error.mean(axis=0)[:, None]], axis=1
    )
    return float(loss), gradient.ravel()


@pytest.mark.parametrize("weight_decay", [1e-3, 1e-1, 10.0])
def test_finds_the_optimum_that_scipy_finds(weight_decay: float) -> None:
    features, labels = problem()
    features = (features - features.mean(dim=0)) / features.std(dim=0)
    weight, bias = fit_logistic_regression(features, labels, weight_decay=weight_decay)
    x, y = features.double().numpy(), labels.numpy()
    found = torch.cat([weight, bias[:, None]], dim=1).numpy().ravel()
    loss, gradient = objective(found, x, y, 4, weight_decay)
    assert np.abs(gradient).max() < 2e-6
    best = minimize(
        objective,
        np.zeros_like(found),
        args=(x, y, 4, weight_decay),
        jac=True,
        method="BFGS",
        options={"gtol": 1e-9},
    )
    assert loss == pytest.approx(best.fun, abs=1e-9)
    np.testing.assert_allclose(weight.numpy(), best.x.reshape(4, -1)[:, :-1], atol=1e-4)


def test_separable_classes_still_have_an_optimum() -> None:
    features = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
    labels = torch.tensor([0, 0, 1, 1])
    weight, bias = fit_logistic_regression(features, labels, weight_decay=1e-3)
    _, gradient = objective(
        torch.cat([weight, bias[:, None]], dim=1).numpy().ravel(),
        features.double().numpy(),
        labels.numpy(),
        2,
        1e-3,
    )
    assert np.abs(gradient).max() < 2e-6


def test_accuracy_is_that_of_the_standardised_fit() -> None:
    (train, labels), (test, targets) = problem(), problem(300, seed=1)
    accuracy = linear_probe_accuracy(train, labels, test, targets)
    assert 50 < accuracy < 99
    # Neither scale nor offset of a feature may matter; a probe without standardisation fails here.
    scale = torch.logspace(-3, 3, train.shape[1], dtype=torch.float64)
    moved = linear_probe_accuracy(train * scale + 7, labels, test * scale + 7, targets)
    assert moved == pytest.approx(accuracy, abs=0.4)


def test_a_dead_feature_changes_nothing() -> None:
    (train, labels), (test, targets) = problem(), problem(100, seed=1)
    dead = torch.ones(1)
    with_dead = linear_probe_accuracy(
        torch.cat([train, dead.expand(len(train), 1)], dim=1),
        labels,
        torch.cat([test, 50 * dead.expand(len(test), 1)], dim=1),
        targets,
    )
    assert with_dead == linear_probe_accuracy(train, labels, test, targets)


def test_is_deterministic_and_leaves_the_generator_and_features_alone() -> None:
    (train, labels), (test, targets) = problem(), problem(100, seed=1)
    state, copy = torch.get_rng_state(), train.clone()
    with torch.no_grad():  # callers evaluate without gradients
        first = fit_logistic_regression(train, labels, weight_decay=0.1)
    second = fit_logistic_regression(train, labels, weight_decay=0.1)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    linear_probe_accuracy(train, labels, test, targets)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(train, copy)


def test_bad_input_is_one_clear_line() -> None:
    train, test = problem(), problem(50, seed=1)
    with pytest.raises(ValueError, match=r"got weight_decay=0\.0; expected > 0"):
        linear_probe_accuracy(*train, *test, weight_decay=0.0)
    with pytest.raises(ValueError, match="6 and test features of 2 dimensions"):
        linear_probe_accuracy(*train, test[0][:, :2], test[1])
    with pytest.raises(ValueError, match="train features that are not finite"):
        linear_probe_accuracy(train[0] / 0, train[1], *test)
