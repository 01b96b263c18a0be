"""Blurs: out of focus, through frosted glass, in motion, and zooming.

As in make_imagenet_c.py (arXiv 1903.12261): images are float64 of shape (height, width, 3) in [0, 1].
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.ndimage import correlate1d
from scipy.signal import fftconvolve
from skimage.filters import gaussian

from aemim_algorithm.evaluation.corruptions.filters import smear, zoom_into_middle

__all__ = ["defocus_blur", "glass_blur", "motion_blur", "take_along_chains", "zoom_blur"]


def defocus_blur(image: np.ndarray, disk: tuple[float, float], generator: np.random.Generator) -> np.ndarray:
    """Average over a disk; beyond the border the image is mirrored. Draws nothing.

    Args:
        image: Shape (height, width, 3), in [0, 1].
        disk: Radius of the disk and deviation of the blur that softens its rim, both in pixels.
        generator: Not used.

    Returns:
        Shape (height, width, 3).
    """
    kernel = _disk(*disk)
    margin = len(kernel) // 2
    padded = np.pad(image, [(margin, margin), (margin, margin), (0, 0)], mode="reflect")
    # The kernel is its own mirror image, so that convolution and correlation are the same.
    return fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1))


@lru_cache(maxsize=16)
def _disk(radius: float, softness: float) -> np.ndarray:
    """A disk of sum 1 with a blurred rim, shape (side, side), float64, without rows of zeros around it."""
    reach, taps = (8, 3) if radius <= 8 else (int(radius), 5)
    axis = np.arange(-reach, reach + 1)
    disk = (axis[:, None] ** 2 + axis**2 <= radius**2).astype(np.float64)
    soften = np.exp(-((np.arange(taps) - taps // 2) ** 2) / (2 * softness**2))
    for dimension in (0, 1):
        disk = correlate1d(disk, soften / soften.sum(), axis=dimension, mode="mirror")
    # The official one divides by the sum before softening, where the mirrored rim can add to it.
    disk /= (axis[:, None] ** 2 + axis**2 <= radius**2).sum()
    empty = int(np.argmax(disk.any(axis=0)))
    return disk[empty : len(disk) - empty, empty : len(disk) - empty]


def glass_blur(
    image: np.ndarray, glass: tuple[float, int, int], generator: np.random.Generator
) -> np.ndarray:
    """Blur, move pixels about, blur again.

    From the lower right to the upper left, each pixel takes the value that one of its neighbours has at
    that moment. The official loop means to swap the two, but swaps views of one NumPy array, by which the
    neighbour keeps its value; the official images were made so.

    Args:
        image: Shape (height, width, 3), in [0, 1].
        glass: Deviation of both blurs in pixels, farthest neighbour in pixels, passes over the image.
        generator: Source of randomness.

    Returns:
        Shape (height, width, 3).
    """
    deviation, reach, passes = glass
    pixels = (gaussian(image, sigma=deviation, channel_axis=-1) * 255).astype(np.uint8)
    height, width = pixels.shape[:2]
    for _ in range(passes):
        # Neighbours lie -reach to reach - 1 away: the official bound is exclusive.
        steps = generator.integers(-reach, reach, size=(2, height - 2 * reach, width - 2 * reach))
        pixels = take_along_chains(pixels, steps, reach=reach)
    return gaussian(pixels / 255, sigma=deviation, channel_axis=-1)


def take_along_chains(pixels: np.ndarray, steps: np.ndarray, *, reach: int) -> np.ndarray:
    """One pass of `glass_blur` without a loop over pixels.

    Rows and columns from ``side - reach`` down to ``reach + 1`` each take their neighbour's value. Where
    the neighbour had its turn before, that is again its neighbour's value, and so on: a chain, whose end
    is found by pointer doubling.

    Args:
        pixels: Shape (height, width, channels).
        steps: Shape (2, height - 2 · reach, width - 2 · reach), integers in [-reach, reach): down and right
            from each pixel that moves to its neighbour.
        reach: In pixels.

    Returns:
        Same shape and dtype as ``pixels``, a new array.
    """
    height, width = pixels.shape[:2]
    inner = (slice(reach + 1, height - reach + 1), slice(reach + 1, width - reach + 1))
    places = np.arange(height * width).reshape(height, width)
    neighbour = places.copy()
    neighbour[inner] += steps[0] * width + steps[1]
    moves = np.zeros((height, width), bool)
    moves[inner] = True
    places, neighbour, moves = places.ravel(), neighbour.ravel(), moves.ravel()
    # The turn comes earlier the higher the place, so that a chain climbs and has an end.
    goes_on = moves & moves[neighbour] & (neighbour > places)
    follow = np.where(goes_on, neighbour, places)
    while not np.array_equal(further := follow[follow], follow):
        follow = further
    return pixels.reshape(height * width, -1)[neighbour[follow]].reshape(pixels.shape)


def motion_blur(image: np.ndarray, motion: tuple[int, float], generator: np.random.Generator) -> np.ndarray:
    """Smear along a line at a random angle between -45 and 45 degrees.

    Args:
        image: Shape (height, width, 3), in [0, 1].
        motion: Radius and deviation of `smear`, in pixels.
        generator: Source of randomness.

    Returns:
        Shape (height, width, 3), of whole 1/255: ImageMagick, which made the official ones, rounds.
    """
    radius, sigma = motion
    blurred = smear(image, radius=radius, sigma=sigma, degrees=generator.uniform(-45, 45))
    return np.rint(blurred.astype(np.float64) * 255) / 255


def zoom_blur(image: np.ndarray, factors: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    """Average the image with enlargements of its middle. Draws nothing.

    Args:
        image: Shape (height, width, 3), in [0, 1].
        factors: Of the enlargements, the first of them 1: the image itself counts twice.
        generator: Not used.

    Returns:
        Shape (height, width, 3), float32.
    """
    image = image.astype(np.float32)
    return sum((zoom_into_middle(image, factor) for factor in factors), image) / (len(factors) + 1)
