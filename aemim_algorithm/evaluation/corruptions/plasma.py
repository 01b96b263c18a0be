"""Clouds for fog: a random height map by the diamond-square algorithm."""

from __future__ import annotations

import numpy as np

__all__ = ["plasma"]


def plasma(side: int, decay: float, generator: np.random.Generator) -> np.ndarray:
    """Draw a height map that wraps around at its borders.

    Points between known ones get the mean of their four neighbours and a uniform shift, whose bound shrinks
    by ``decay`` squared from each scale to the next: it starts at 100 · 100, and both factors decay.

    Args:
        side: Of the map, a power of 2.
        decay: Above 1; larger is smoother.
        generator: Source of randomness.

    Returns:
        Shape (side, side), float64, from 0 to 1.
    """
    heights = np.zeros((side, side))
    step, bound = side, 100.0

    def shifted(sums: np.ndarray) -> np.ndarray:
        return sums / 4 + bound * generator.uniform(-bound, bound, sums.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        rows = corners + np.roll(corners, -1, axis=0)
        centres = shifted(rows + np.roll(rows, -1, axis=1))
        heights[half::step, half::step] = centres
        sums = centres + np.roll(centres, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        heights[::step, half::step] = shifted(sums)
        sums = centres + np.roll(centres, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        heights[half::step, ::step] = shifted(sums)
        step, bound = half, bound / decay
    heights -= heights.min()
    return heights / heights.max()
