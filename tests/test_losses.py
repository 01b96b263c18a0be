"""Distances against NumPy, and the reduction of what models may return."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from aemim_algorithm.losses import kl_divergence, l2_distance, num_tokens, total_loss


def softmax(values: np.ndarray, axis: int) -> np.ndarray:
    exponential = np.exp(values - values.max(axis, keepdims=True))
    return exponential / exponential.sum(axis, keepdims=True)


@pytest.mark.parametrize(
    ("shape", "axis", "tokens"), [((3, 5, 7), 2, 5), ((3, 7), 1, 1), ((3, 7, 2, 4), 1, 8)]
)
def test_distances_agree_with_numpy(shape: tuple[int, ...], axis: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features, reference = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    f, r = features.numpy(), reference.numpy()
    assert np.allclose(l2_distance(features, reference, axis), ((f - r) ** 2).reshape(3, -1).sum(1))
    p, q = softmax(r, axis), softmax(f, axis)
    assert np.allclose(kl_divergence(features, reference, axis), (p * np.log(p / q)).reshape(3, -1).sum(1))
    assert num_tokens(features, axis) == tokens


def test_distance_is_computed_in_float32() -> None:
    reference = torch.full((1, 4, 8), 300.0, dtype=torch.float16)
    features = (reference + 1).half()
    assert l2_distance(features, reference).dtype == torch.float32
    assert l2_distance(features, -reference) == pytest.approx(32 * 601**2)  # overflows in float16


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (torch.tensor(2.0), 2.0),
        (torch.tensor([1.0, 3.0]), 2.0),
        ((torch.tensor(1.0), torch.tensor(2.0)), 3.0),
        ({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, 3.0),
        ({"a": torch.tensor(1.0), "total": torch.tensor(5.0)}, 5.0),
    ],
)
def test_total_loss_is_what_the_trainer_sums(loss: Tensor, expected: float) -> None:
    assert total_loss(loss).item() == expected
