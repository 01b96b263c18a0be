from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import aemim_algorithm.evaluation.knn as knn_module
from aemim_algorithm.evaluation import knn_accuracy


def noisy_classes(
    n: int, *, classes: int = 5, dim: int = 8, noise: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Gaussian blobs around the same centres for every seed."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    return centres[labels] + noise * torch.randn(n, dim, generator=generator), labels


def oracle(train: Any, labels: Any, test: Any, targets: Any, k: int, temperature: float) -> float:
    """The rule in plain loops and float64."""
    train, test = np.asarray(train, dtype=np.float64), np.asarray(test, dtype=np.float64)
    right = 0
    for x, target in zip(test, targets.tolist(), strict=True):
        cosine = [float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)) for y in train]
        nearest = sorted(range(len(train)), key=lambda i: -cosine[i])[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            label = int(labels[i])
            votes[label] = votes.get(label, 0.0) + math.exp(cosine[i] / temperature)
        right += max(votes, key=lambda label: votes[label]) == target
    return 100.0 * right / len(test)


@pytest.mark.parametrize("k", [1, 7, 20])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_agrees_with_the_rule_in_plain_loops(k: int, temperature: float) -> None:
    train, test = noisy_classes(150), noisy_classes(80, seed=1)
    expected = oracle(*train, *test, k, temperature)
    assert 30 < expected < 95  # neither trivial nor hopeless
    assert knn_accuracy(*train, *test, k=k, temperature=temperature) == pytest.approx(expected)


def test_the_size_of_the_chunks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = noisy_classes(100), noisy_classes(37, seed=1)
    whole = knn_accuracy(*train, *test)
    monkeypatch.setattr(knn_module, "_MAX_SIMILARITIES", 300)  # three rows at a time
    assert knn_accuracy(*train, *test) == whole


def test_only_the_direction_of_a_feature_counts() -> None:
    (train, labels), (test, targets) = noisy_classes(100), noisy_classes(50, seed=1)
    scale = torch.rand(100, 1, generator=torch.Generator().manual_seed(2)) * 9 + 0.5
    plain = knn_accuracy(train, labels, test, targets)
    assert knn_accuracy(train * scale, labels, test * 3, targets) == plain


def test_low_temperature_listens_to_the_nearest() -> None:
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, 0.6]])
    labels, test = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    target = torch.tensor([0])
    assert knn_accuracy(train, labels, test, target, k=3, temperature=0.01) == 100.0
    assert knn_accuracy(train, labels, test, target, k=3, temperature=10.0) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "got k=0; expected 1 <= k <= 30"),
        ({"k": 31}, "got k=31; expected 1 <= k <= 30"),
        ({"temperature": 0.0}, r"got temperature=0\.0; expected > 0"),
    ],
)
def test_arguments_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        knn_accuracy(*noisy_classes(30), *noisy_classes(5), **change)


def test_features_that_do_not_fit() -> None:
    train, test = noisy_classes(30), noisy_classes(5)
    with pytest.raises(ValueError, match="8 and test features of 4 dimensions"):
        knn_accuracy(*train, test[0][:, :4], test[1])
    with pytest.raises(ValueError, match="train features of shape"):
        knn_accuracy(train[0], train[1][:-1], *test)
    with pytest.raises(ValueError, match="test features that are not finite"):
        knn_accuracy(*train, test[0] / 0, test[1])
    with pytest.raises(ValueError, match="test labels"):
        knn_accuracy(*train, test[0], test[1] - 9)
