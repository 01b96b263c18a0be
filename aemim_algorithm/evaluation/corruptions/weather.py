"""Weather: snow, frost, fog and bright light.

As in make_imagenet_c.py (arXiv 1903.12261): images are float64 of shape (height, width, 3) in [0, 1].
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from skimage.color import hsv2rgb, rgb2hsv

from aemim_algorithm.evaluation.corruptions.filters import smear, zoom_into_middle
from aemim_algorithm.evaluation.corruptions.photographs import FROST_FILES, frost_photograph
from aemim_algorithm.evaluation.corruptions.plasma import plasma

__all__ = ["brightness", "fog", "frost", "small_frost", "snow"]

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, the grey of OpenCV and PIL


def snow(image: np.ndarray, snowfall: tuple[float, ...], generator: np.random.Generator) -> np.ndarray:
    """Whiten the scene and let flakes fall over it, in one direction and in its opposite.

    Args:
        image: Shape (height, width, 3), in [0, 1].
        snowfall: Mean and deviation of the flakes' brightness, their enlargement, the brightness from which
            on they are seen, radius and deviation of their smear in pixels, weight of the unwhitened image.
        generator: Source of randomness.

    Returns:
        Shape (height, width, 3); values may exceed 1.
    """
    mean, deviation, enlargement, seen, radius, sigma, weight = snowfall
    flakes = generator.normal(mean, deviation, size=image.shape[:2])
    flakes = zoom_into_middle(flakes, enlargement)
    flakes = np.where(flakes < seen, 0, np.clip(flakes, 0, 1))
    flakes = np.trunc(flakes * 255) / 255  # the official layer is an 8-bit image, smeared by ImageMagick
    flakes = smear(flakes, radius=int(radius), sigma=sigma, degrees=generator.uniform(-135, -45))
    flakes = (np.rint(flakes.astype(np.float64) * 255) / 255)[..., None]
    whitened = np.maximum(image, (image @ _LUMA)[..., None] * 1.5 + 0.5)
    return weight * image + (1 - weight) * whitened + flakes + np.rot90(flakes, 2)


def frost(image: np.ndarray, weights: tuple[float, float], generator: np.random.Generator) -> np.ndarray:
    """Lay a random part of a photograph of frost over the image.

    Args:
        image: Shape (height, width, 3), in [0, 1].
        weights: Of the image and of the photograph.
        generator: Source of randomness.

    Returns:
        Shape (height, width, 3); values may exceed 1.

    Raises:
        ValueError: The photographs are not installed.
    """
    return _under_frost(image, weights, generator, every=1)


def small_frost(
    image: np.ndarray, weights: tuple[float, float], generator: np.random.Generator
) -> np.ndarray:
    """`frost` for images of 32 pixels: the photographs have a fifth of their size."""
    return _under_frost(image, weights, generator, every=5)


def _under_frost(
    image: np.ndarray, weights: tuple[float, float], generator: np.random.Generator, *, every: int
) -> np.ndarray:
    height, width = image.shape[:2]
    photograph = frost_photograph(int(generator.integers(len(FROST_FILES))), every=every)
    photograph = _at_least(photograph, height + 1, width + 1)
    top = int(generator.integers(photograph.shape[0] - height))
    left = int(generator.integers(photograph.shape[1] - width))
    part = photograph[top : top + height, left : left + width]
    return weights[0] * image + weights[1] * (part / 255)


def _at_least(photograph: np.ndarray, height: int, width: int) -> np.ndarray:
    """The photograph itself, or enlarged where the official ones are too small for the image."""
    scale = max(height / photograph.shape[0], width / photograph.shape[1])
    if scale <= 1:
        return photograph
    size = [math.ceil(side * scale) for side in (photograph.shape[1], photograph.shape[0])]
    return np.asarray(Image.fromarray(photograph).resize((size[0], size[1]), Image.Resampling.BICUBIC))


def fog(image: np.ndarray, cloud: tuple[float, float], generator: np.random.Generator) -> np.ndarray:
    """Add clouds, and darken so that the brightest value stays what it was.

    Args:
        image: Shape (height, width, 3), in [0, 1].
        cloud: Height of the clouds, of the pixel range, and decay of `plasma`.
        generator: Source of randomness.

    Returns:
        Shape (height, width, 3).
    """
    height, width = image.shape[:2]
    amount, decay = cloud
    clouds = plasma(1 << (max(height, width) - 1).bit_length(), decay, generator)[:height, :width, None]
    brightest = image.max()
    return (image + amount * clouds) * (brightest / (brightest + amount))


def brightness(image: np.ndarray, amount: float, generator: np.random.Generator) -> np.ndarray:
    """Raise the value of the HSV colour, up to 1. Draws nothing.

    Args:
        image: Shape (height, width, 3), in [0, 1].
        amount: What is added.
        generator: Not used.

    Returns:
        Shape (height, width, 3), in [0, 1].
    """
    colours = rgb2hsv(image)
    colours[..., 2] = np.clip(colours[..., 2] + amount, 0, 1)
    return hsv2rgb(colours)
