"""Weighted k-nearest-neighbour accuracy, the probe that trains nothing.

The rule of instance discrimination (Wu et al. 2018, arXiv 1805.01978, section 3.4), which DINO
(Caron et al. 2021, arXiv 2104.14294) made the custom: cosine similarity s_i to the training
features, the k nearest vote for their class with weight exp(s_i / temperature).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from aemim_algorithm.evaluation.features import check_features

__all__ = ["knn_accuracy"]

# Similarities held at once: 2^26 float32 are 256 MiB.
_MAX_SIMILARITIES = 2**26


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Top-1 accuracy of the weighted k-NN vote.

    Args:
        train_features: shape (n, dim), float.
        train_labels: shape (n,), integers from 0.
        test_features: shape (m, dim), float.
        test_labels: shape (m,), integers from 0.
        k: number of neighbours that vote, 1 <= k <= n.
        temperature: of the votes, > 0; smaller listens more to the nearest.

    Returns:
        Percent of the test samples that are classified right.

    Raises:
        ValueError: if the features do not fit each other or an argument is out of range.
    """
    check_features(train_features, train_labels, split="train")
    check_features(test_features, test_labels, split="test")
    _check_arguments(train_features, test_features, k=k, temperature=temperature)
    train_features = F.normalize(train_features.float(), dim=1)
    classes = int(train_labels.max()) + 1
    rows = max(1, _MAX_SIMILARITIES // len(train_features))
    correct = 0
    for chunk, targets in zip(test_features.split(rows), test_labels.split(rows), strict=True):
        similarities = F.normalize(chunk.float(), dim=1) @ train_features.T
        nearest = similarities.topk(k, dim=1)
        weights = (nearest.values / temperature).softmax(dim=1)
        votes = weights.new_zeros(len(chunk), classes)
        votes.scatter_add_(1, train_labels[nearest.indices], weights)
        correct += int((votes.argmax(dim=1) == targets).sum())
    return 100.0 * correct / len(test_labels)


def _check_arguments(train: Tensor, test: Tensor, *, k: int, temperature: float) -> None:
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            f"got train features of {train.shape[1]} and test features of {test.shape[1]} "
            "dimensions; expected one encoder's features"
        )
    if not 1 <= k <= len(train):
        raise ValueError(f"got k={k}; expected 1 <= k <= {len(train)}, the training samples")
    if not temperature > 0:
        raise ValueError(f"got temperature={temperature}; expected > 0")
