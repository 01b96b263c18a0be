"""Digital damage: low contrast, elastic distortion, large pixels and JPEG.

As in make_imagenet_c.py (arXiv 1903.12261): images are float64 of shape (height, width, 3) in [0, 1].
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter1d, map_coordinates

__all__ = ["contrast", "elastic_transform", "jpeg_compression", "pixelate"]


def contrast(image: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Keep a share of each value's distance from its channel's mean. Draws nothing.

    Args:
        image: Shape (height, width, 3), in [0, 1].
        share: What is kept.
        generator: Not used.

    Returns:
        Shape (height, width, 3), in [0, 1].
    """
    means = image.mean(axis=(0, 1), keepdims=True)
    return (image - means) * share + means


def elastic_transform(
    image: np.ndarray, forces: tuple[float, float, float], generator: np.random.Generator
) -> np.ndarray:
    """A random affine map, then a smooth random displacement of each pixel; both bilinear.

    This is the official one. That of the package imagecorruptions-imaug has no affine map and other forces.

    Args:
        image: Shape (height, width, 3), in [0, 1].
        forces: Factor of the displacement, deviation of the blur that smooths it, and how far each of the
            affine map's three points moves at most; all in pixels.
        generator: Source of randomness.

    Returns:
        Shape (height, width, 3), in [0, 1].
    """
    amplitude, smoothness, reach = forces
    height, width = image.shape[:2]
    grid = np.mgrid[:height, :width].astype(np.float64)
    backward = _random_affine(height, width, reach, generator)
    columns, rows = np.einsum("ij,jhw->ihw", backward[:, :2], grid[::-1]) + backward[:, 2, None, None]
    image = _sample(image, np.stack([rows, columns]), mode="mirror")
    return _sample(
        image, grid + _displacement(height, width, amplitude, smoothness, generator), mode="reflect"
    )


def _random_affine(height: int, width: int, reach: float, generator: np.random.Generator) -> np.ndarray:
    """Shape (2, 3): where in the image (x, y) is to be read for each place (x, y) of the result."""
    # The official script takes (height, width) for (x, y) here, which matters for images that are not square.
    middle, side = np.array([height // 2, width // 2]), min(height, width) // 3
    before = middle + side * np.array([[1, 1], [1, -1], [-1, -1]])
    after = before + generator.uniform(-reach, reach, size=(3, 2))
    return np.linalg.solve(np.column_stack([after, np.ones(3)]), before.astype(np.float64)).T


def _displacement(
    height: int, width: int, amplitude: float, smoothness: float, generator: np.random.Generator
) -> np.ndarray:
    """Shape (2, height, width), in pixels."""
    if amplitude == 0:
        return np.zeros((2, height, width))
    columns_then_rows = generator.uniform(-1, 1, size=(2, height, width))
    noise = columns_then_rows[::-1]
    return amplitude * (_smoothing(height, smoothness) @ noise @ _smoothing(width, smoothness).T)


@lru_cache(maxsize=16)
def _smoothing(side: int, deviation: float) -> np.ndarray:
    """A Gaussian blur as a matrix: the widest kernel reaches 512 pixels, a product takes no longer for it."""
    return gaussian_filter1d(np.eye(side), deviation, axis=0, mode="reflect", truncate=3)


def _sample(image: np.ndarray, places: np.ndarray, *, mode: str) -> np.ndarray:
    channels = [map_coordinates(channel, places, order=1, mode=mode) for channel in np.moveaxis(image, -1, 0)]
    return np.stack(channels, axis=-1)


def pixelate(image: np.ndarray, scale: float, generator: np.random.Generator) -> np.ndarray:
    """Shrink and enlarge by PIL's box filter. Draws nothing.

    Args:
        image: Shape (height, width, 3), in [0, 1].
        scale: Of the small image's sides.
        generator: Not used.

    Returns:
        Shape (height, width, 3), of whole 1/255.
    """
    height, width = image.shape[:2]
    small = _picture(image).resize((int(width * scale), int(height * scale)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)) / 255


def jpeg_compression(image: np.ndarray, quality: int, generator: np.random.Generator) -> np.ndarray:
    """Compress and decompress by PIL. Draws nothing.

    Args:
        image: Shape (height, width, 3), in [0, 1].
        quality: PIL's, from 1 to 95.
        generator: Not used.

    Returns:
        Shape (height, width, 3), of whole 1/255.
    """
    file = BytesIO()
    _picture(image).save(file, "JPEG", quality=quality)
    with Image.open(file) as picture:
        return np.asarray(picture) / 255


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(image * 255).astype(np.uint8))
