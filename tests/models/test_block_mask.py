"""Masks of rectangles: their number of patches, their shape, their place, and where the numbers come from."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from aemim_algorithm.models.masking import block_mask, random_mask


def masks(count: int, grid: tuple[int, int] = (14, 14), hidden: int = 75, **options: float) -> Tensor:
    found = block_mask(count, grid, hidden, seeds=torch.arange(count), **options)  # type: ignore[arg-type]
    return found.view(count, *grid)


@pytest.mark.parametrize(
    ("grid", "hidden"), [((14, 14), 75), ((14, 14), 78), ((14, 14), 147), ((8, 8), 24), ((4, 4), 6),
                         ((7, 12), 30), ((14, 14), 0), ((14, 14), 196), ((2, 2), 1)],
)  # fmt: skip
def test_hides_exactly_so_many_of_each_image(grid: tuple[int, int], hidden: int) -> None:
    mask = block_mask(300, grid, hidden)
    assert mask.shape == (300, grid[0] * grid[1])
    assert mask.dtype == torch.bool
    assert mask.sum(1).eq(hidden).all()


def test_hidden_patches_form_rectangles() -> None:
    """Far more neighbours of a hidden patch are hidden than among patches drawn one by one."""

    def hidden_neighbours(mask: Tensor) -> float:
        pairs = [mask[:, 1:] & mask[:, :-1], mask[:, :, 1:] & mask[:, :, :-1]]
        return sum(pair.sum().item() for pair in pairs) / mask.sum().item()

    single = random_mask(500, 196, 75 / 196).view(-1, 14, 14)
    assert hidden_neighbours(single) < 0.85
    assert hidden_neighbours(masks(500)) > 1.4


def test_one_rectangle_has_the_area_and_aspect_asked_for() -> None:
    """Fewer hidden patches than the smallest rectangle has: there is one, short of some at one side."""
    widths, sides = [], []
    for mask in masks(600, (30, 30), 30, min_patches=36, max_aspect=2.0).numpy():
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        rectangle = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        lacking = ~rectangle.all(1)
        assert lacking.sum() <= 1
        assert not lacking[1:-1].any()
        widths.append(rectangle.shape[1])
        sides += [bool(lacking[0])] * bool(lacking.any())
        assert 36 / widths[-1] ** 2 == pytest.approx(1, rel=1.3)
    assert len(sides) > 100
    assert np.mean(sides) == pytest.approx(0.5, abs=0.1)  # at the top as often as at the bottom
    # sqrt(36 / ratio), rounded, for ratios in [1/2, 2] whose logarithm is even.
    drawn = np.sqrt(36 / np.exp(np.random.default_rng(0).uniform(-np.log(2), np.log(2), 100_000))).round()
    for width in (4, 5, 6, 7, 8):
        assert np.mean(np.array(widths) == width) == pytest.approx(np.mean(drawn == width), abs=0.06)


def algorithm_1(generator: np.random.Generator) -> np.ndarray:
    """The paper's loop for 75 of 14×14 patches; its last rectangle may hide too many."""
    mask = np.zeros((14, 14), bool)
    while (missing := 75 - mask.sum()) > 0:
        size = generator.uniform(16, max(16, missing))
        ratio = np.exp(generator.uniform(np.log(0.3), np.log(1 / 0.3)))
        height, width = (min(14, round(side)) for side in (np.sqrt(size * ratio), np.sqrt(size / ratio)))
        top, left = generator.integers(0, 15 - height), generator.integers(0, 15 - width)
        mask[top : top + height, left : left + width] = True
    return mask


def test_hides_each_place_as_often_as_the_paper() -> None:
    generator = np.random.default_rng(0)
    paper = torch.tensor(np.mean([algorithm_1(generator) for _ in range(3000)], axis=0))
    found = masks(8000).double().mean(0)
    assert paper.max() - paper.min() > 0.5  # the middle far more often than the corners
    assert (found - paper * 75 / paper.sum()).abs().max() < 0.05
    assert torch.allclose(found, found.flip(0), atol=0.04)
    assert len(masks(1000).flatten(1).unique(dim=0)) > 980


def test_rectangles_are_drawn_from_torchs_generator_alone() -> None:
    torch.manual_seed(5)
    others = random.getstate(), np.random.get_state(legacy=False)
    first, after = block_mask(9, (14, 14), 75), torch.rand(3)
    np.testing.assert_equal((random.getstate(), np.random.get_state(legacy=False)), others)
    torch.manual_seed(5)
    assert torch.equal(block_mask(9, (14, 14), 75), first)
    assert torch.equal(torch.rand(3), after)
    assert not torch.equal(block_mask(9, (14, 14), 75), first)


def test_needs_no_values_so_it_can_be_traced() -> None:
    mask = block_mask(4, (14, 14), 75, device=torch.device("meta"))
    assert (mask.shape, mask.device.type) == ((4, 196), "meta")
