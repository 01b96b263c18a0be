"""The noise is uniform, independent, and belongs to (seed, batch, position) alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from aemim_algorithm.randomness import RngState, choose_samples, uniform, uniform_noise


def noise(positions: Tensor, seed: int = 1, batch: int = 2, size: int = 32) -> Tensor:
    shape = torch.Size([len(positions), 3, size, size])
    return uniform_noise(shape, seed=seed, batch=batch, positions=positions)


def test_depends_on_the_position_and_not_on_the_rest_of_the_batch() -> None:
    whole = noise(torch.arange(8))
    assert torch.equal(noise(torch.tensor([5, 2])), whole[[5, 2]])
    for other in (
        noise(torch.arange(8), seed=2),
        noise(torch.arange(8), batch=3),
        noise(torch.arange(8, 16)),
    ):
        assert (other == whole).float().mean() < 1e-3


def test_is_uniform_and_uncorrelated() -> None:
    values = noise(torch.arange(64)).flatten(1)
    assert -1 <= values.min() < -0.999
    assert 0.999 < values.max() < 1
    counts = torch.histc(values, bins=64, min=-1, max=1)
    expected = values.numel() / 64
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 63 + 4 * (2 * 63) ** 0.5
    between = torch.corrcoef(torch.cat([values, noise(torch.arange(64), batch=3).flatten(1)]))
    bound = 5.5 / values.shape[1] ** 0.5
    assert between.fill_diagonal_(0).abs().max() < bound
    for lag in (1, 2, 3, 4, 8, 32, 1024):
        assert torch.corrcoef(torch.stack([values[0, :-lag], values[0, lag:]]))[0, 1].abs() < bound


@pytest.mark.parametrize(
    ("size", "ratio", "count"), [(16, 0.25, 4), (16, 1.0, 16), (10, 0.3, 3), (2, 0.25, 1)]
)
def test_choice_is_stratified(size: int, ratio: float, count: int) -> None:
    chosen = choose_samples(size, ratio, seed=1, batch=1)
    assert len(chosen) == count
    assert len(set(chosen.tolist())) == count
    assert ((chosen >= 0) & (chosen < size)).all()
    if size % count == 0:
        assert torch.equal(chosen // (size // count), torch.arange(count))


@pytest.mark.parametrize(("size", "ratio"), [(4, 0.25), (8, 0.75), (10, 0.3)])
def test_every_sample_is_as_likely(size: int, ratio: float) -> None:
    counts, count = torch.zeros(size), round(size * ratio)
    for seed in range(5):
        for batch in range(800):
            counts[choose_samples(size, ratio, seed=seed, batch=batch)] += 1
    expected = 4000 * count / size
    deviation = (expected * (1 - count / size)) ** 0.5  # at most: strata vary less
    assert (counts - expected).abs().max() < 4 * deviation


def test_uniform_numbers_belong_to_the_seed_of_a_sample() -> None:
    seeds = torch.tensor([5, -(2**63), 2**63 - 1, 0, 1])
    whole = uniform(seeds, 1000)
    assert torch.equal(uniform(seeds[[3, 1]], 1000), whole[[3, 1]])
    assert torch.equal(uniform(seeds, 10), whole[:, :10])
    assert whole.min() >= 0
    assert whole.max() < 1
    assert torch.corrcoef(whole).fill_diagonal_(0).abs().max() < 0.2
    counts = torch.histc(uniform(torch.arange(64), 1000), bins=64, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 63 + 4 * (2 * 63) ** 0.5


def test_rng_state_restores_every_generator() -> None:
    state = RngState.capture()
    drawn = [(random.random(), np.random.rand(), torch.rand(3))]
    assert state != RngState.capture()
    state.restore()
    assert state == RngState.capture()
    drawn.append((random.random(), np.random.rand(), torch.rand(3)))
    assert drawn[0][:2] == drawn[1][:2]
    assert torch.equal(drawn[0][2], drawn[1][2])
