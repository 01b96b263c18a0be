"""The share of a batch that is attacked is that of the global batch, for any number of ranks and micro-batches."""

from __future__ import annotations

import pytest
import torch
from composer.utils import dist

from aemim_algorithm.plan import BatchPlan
from aemim_algorithm.randomness import choose_samples

GLOBAL = 24
IMAGES = torch.zeros(GLOBAL, 3, 4, 4)


def shares(
    world: int, micro_batches: int, ratio: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[int, float], dict[int, torch.Tensor]]:
    """Weight of each global sample in the gradient that ranks average, and its noise."""
    weights: dict[int, float] = {}
    noise: dict[int, torch.Tensor] = {}
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    size = GLOBAL // world
    micro = size // micro_batches
    for rank in range(world):
        monkeypatch.setattr(dist, "get_global_rank", lambda rank=rank: rank)
        plan = BatchPlan(size, ratio, seed=3, number=5)
        for start in range(0, size, micro):
            share = plan.take(micro)
            assert world == 1 or share is not None, "ranks must run the same passes"
            if share is None:
                continue
            index = torch.arange(micro) if share.index is None else share.index
            made = share.noise(IMAGES[: len(index)])
            for row, sample in enumerate(index.tolist()):
                if share.weight > 0:
                    position = rank * size + start + sample
                    assert position not in weights
                    # A mean over the share, over micro-batches and over ranks.
                    weights[position] = share.weight / len(index) * micro / size / world
                    noise[position] = made[row]
    return weights, noise


@pytest.mark.parametrize("ratio", [1.0, 0.75, 0.3, 0.25, 0.05])
def test_the_choice_is_that_of_the_global_batch(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choose_samples(GLOBAL, ratio, seed=3, batch=5).tolist()
    expected, expected_noise = shares(1, 1, ratio, monkeypatch)
    assert sorted(expected) == chosen
    for world, micro_batches in ((1, 6), (2, 1), (2, 3), (3, 4), (4, 1), (8, 3), (24, 1)):
        weights, noise = shares(world, micro_batches, ratio, monkeypatch)
        assert sorted(weights) == chosen
        for position, weight in weights.items():
            assert weight == pytest.approx(1 / len(chosen))
            assert noise[position].equal(expected_noise[position])


def test_ranks_of_an_even_share_carry_equal_work(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, _ = shares(4, 1, 0.5, monkeypatch)
    counts = [sum(rank * 6 <= position < rank * 6 + 6 for position in weights) for rank in range(4)]
    assert counts == [3, 3, 3, 3]
