"""The MAE paper's linear probe: its schedule, its first step by hand, its result against the optimum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from aemim_algorithm.evaluation.linear_probe import linear_probe_accuracy
from aemim_algorithm.evaluation.mae_probe import (
    MaeProbe,
    _head,
    _train,
    mae_probe_accuracy,
    probe_learning_rate,
)


def blobs(count: int, seed: int, classes: int = 4, dim: int = 8) -> tuple[Tensor, Tensor]:
    """Overlapping clouds around fixed centres, on a scale of their own per dimension."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % classes
    noise = torch.randn(count, dim, generator=generator)
    return (centres[labels] + noise) * torch.logspace(-2, 2, dim) + 5, labels


def test_the_rate_is_the_paper_s() -> None:
    probe = MaeProbe()
    assert (probe.epochs, probe.warmup_epochs, probe.batch_size) == (90, 10, 16384)
    rates = [probe_learning_rate(probe, epoch, batch_size=16384) for epoch in (0, 2.5, 10, 50, 90)]
    assert rates == pytest.approx([0, 1.6, 6.4, 3.2, 0], abs=1e-12)


def test_one_step_is_lars_by_hand() -> None:
    """In float64 NumPy: batch statistics, softmax gradient, trust ratio for the weight, none for the bias."""
    features, labels = blobs(64, seed=1)
    probe = MaeProbe(epochs=1, warmup_epochs=0, batch_size=64, base_learning_rate=2.0, seed=5)
    trained = _train(features, labels, probe)
    start = _head(8, 4, torch.Generator().manual_seed(5))[1]
    weight, bias = start.weight.detach().double().numpy(), start.bias.detach().double().numpy()
    assert 0.003 < weight.std() < 0.015
    x = features.double().numpy()
    x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-6)
    logits = x @ weight.T + bias
    share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) - np.eye(4)[labels.numpy()]
    gradient = share.T @ x / 64
    rate = 2.0 * 64 / 256
    trust = 0.001 * np.linalg.norm(weight) / np.linalg.norm(gradient)
    expected = weight - rate * trust * gradient
    torch.testing.assert_close(trained[1].weight.detach().double().numpy(), expected, rtol=1e-5, atol=1e-7)
    expected_bias = bias - rate * share.mean(axis=0)
    torch.testing.assert_close(trained[1].bias.detach().double().numpy(), expected_bias, rtol=1e-4, atol=1e-6)


def test_it_comes_near_the_optimum_and_leaves_the_generators() -> None:
    train, test = blobs(2000, seed=1), blobs(1000, seed=2)
    # Few images take a higher rate than the paper's: a step of LARS is a share of the weight's length.
    probe = MaeProbe(epochs=40, warmup_epochs=5, batch_size=256, base_learning_rate=4.0)
    state = torch.get_rng_state()
    ours = mae_probe_accuracy(*train, *test, probe)
    assert torch.equal(torch.get_rng_state(), state)
    assert ours == mae_probe_accuracy(*train, *test, probe)  # a seed decides all
    optimum = linear_probe_accuracy(*train, *test)
    assert 50 < optimum < 99
    assert abs(ours - optimum) < 2.5


def test_a_batch_larger_than_the_set_is_all_of_it() -> None:
    train, test = blobs(100, seed=1), blobs(50, seed=2)
    accuracies = [
        mae_probe_accuracy(*train, *test, MaeProbe(epochs=11, batch_size=size)) for size in (100, 16384)
    ]
    assert accuracies[0] == accuracies[1]
    assert not math.isnan(accuracies[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 10}, "warmup_epochs=10: expected fewer than the 10 epochs"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"base_learning_rate": 0}, "base_learning_rate=0"),
    ],
)
def test_bad_settings_are_one_line(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaeProbe(**options)  # type: ignore[arg-type]


def test_features_of_two_encoders_are_refused() -> None:
    features, labels = blobs(20, seed=1)
    with pytest.raises(ValueError, match="8 and test features of 7"):
        mae_probe_accuracy(features, labels, features[:, :7], labels, MaeProbe())
