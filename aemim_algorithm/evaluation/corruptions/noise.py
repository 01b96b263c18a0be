"""Noise that each pixel and channel draws for itself: Gaussian, shot and impulse.

As in make_imagenet_c.py (arXiv 1903.12261): images are float64 of shape (height, width, 3) in [0, 1].
"""

from __future__ import annotations

import numpy as np

__all__ = ["gaussian_noise", "impulse_noise", "shot_noise"]


def gaussian_noise(image: np.ndarray, deviation: float, generator: np.random.Generator) -> np.ndarray:
    """Add normal noise.

    Args:
        image: Shape (height, width, 3), in [0, 1].
        deviation: Standard deviation of the noise, of the pixel range [0, 1].
        generator: Source of randomness.

    Returns:
        Shape (height, width, 3); values may leave [0, 1].
    """
    return image + generator.normal(scale=deviation, size=image.shape)


def shot_noise(image: np.ndarray, photons: float, generator: np.random.Generator) -> np.ndarray:
    """Count photons: Poisson noise, whose variance is the brightness over ``photons``.

    Args:
        image: Shape (height, width, 3), in [0, 1].
        photons: Expected count of a white pixel.
        generator: Source of randomness.

    Returns:
        Shape (height, width, 3); values may exceed 1.
    """
    return generator.poisson(image * photons) / photons


def impulse_noise(image: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Salt and pepper: values that become 1 or 0, either equally likely, each channel on its own.

    Args:
        image: Shape (height, width, 3), in [0, 1].
        share: Expected share of the values that are replaced.
        generator: Source of randomness.

    Returns:
        Shape (height, width, 3), in [0, 1].
    """
    hit = generator.random(image.shape) < share
    salt = generator.random(image.shape) < 0.5
    return np.where(hit, salt.astype(image.dtype), image)
