"""Random resized crops of a whole batch at once, on whatever device the images are.

The same distribution and the same pixels as `RandomResizedCropFlip`, image by image. A
resize is a product with one matrix per axis; all matrices that an image size can need are made once.
256 crops of 32 pixels cost two small matrix products, in place of 256 calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aemim_algorithm.validation import require_integer

__all__ = ["BatchCrop", "random_crop_boxes"]

_TRIES = 10  # as `random_crop_box`
_A = -0.5  # of the bicubic kernel: Pillow's and, with antialiasing, torch's
_WEIGHT_BITS = 15  # and a sign


class BatchCrop:
    """Crops, resizes to a square and mirrors images of one size: bicubic, antialiased, on uint8.

    Keeps (height + 2 · width) · 2 · side · image_size float32 numbers, where side is the longer of the two:
    0.8 MiB for 32 pixels, 350 MiB for 256 resized to 224.

    Args:
        image_size: Side of the result, in pixels.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        device: Where the images are.

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(self, image_size: int, *, height: int, width: int, device: torch.device | str) -> None:
        for name, value in (("image_size", image_size), ("height", height), ("width", width)):
            require_integer(name, value, low=1)
        self._rows = _placed_matrices(height, image_size).to(device)
        columns = _placed_matrices(width, image_size).to(device)
        self._columns = torch.stack([columns, columns.flip(-1)])
        self.image_size, self.height, self.width = image_size, height, width

    def __call__(self, images: Tensor, boxes: Tensor, mirrored: Tensor) -> Tensor:
        """Cut a box from each image.

        Args:
            images: Shape (batch, height, 3, width), uint8: channels inside, so that each axis is one product.
            boxes: Top, left, height and width of the crops, in pixels, shape (batch, 4), int64.
            mirrored: 1 for what is to be mirrored, else 0, shape (batch,), int64.

        Returns:
            Shape (batch, 3, image_size, image_size), uint8, contiguous.
        """
        top, left, rows, columns = boxes.unbind(1)
        across = _blocks(self._columns, self.width)[mirrored, columns, self.width - left]
        down = _blocks(self._rows, self.height)[rows, self.height - top]
        count, size = len(images), self.image_size
        # Across first, and to whole levels in between, as torchvision does: the kernel overshoots at edges.
        with _without_tf32():
            resized = _to_levels(images.float().view(count, -1, self.width) @ across)
            resized = _to_levels(down.transpose(1, 2) @ resized.view(count, self.height, 3 * size))
        return resized.view(count, size, 3, size).to(torch.uint8).transpose(1, 2).contiguous()


def random_crop_boxes(
    count: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draw: np.random.Generator,
) -> NDArray[np.int64]:
    """Draw the crops of many images of one size: `random_crop_box`, `count` times.

    Args:
        count: Number of crops.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        scale: Bounds of a crop's area, as a fraction of the image's.
        ratio: Bounds of a crop's width over its height; drawn evenly on a log scale.
        draw: Source of randomness.

    Returns:
        Top, left, height and width of each crop, in pixels, shape (count, 4), int64.
    """
    # Where no try fits: the largest crop in the middle whose ratio is allowed.
    aspect = min(max(width / height, ratio[0]), ratio[1])
    sides = np.array([[min(height, round(width / aspect)), min(width, round(height * aspect))]])
    sides = np.repeat(sides, count, axis=0)
    offsets = (np.array([height, width]) - sides) // 2
    waiting = np.arange(count)
    for _ in range(_TRIES):
        areas = height * width * draw.uniform(*scale, len(waiting))
        aspects = np.exp(draw.uniform(math.log(ratio[0]), math.log(ratio[1]), len(waiting)))
        tried = np.rint(np.sqrt(np.stack([areas / aspects, areas * aspects], axis=1))).astype(np.int64)
        room = np.array([height, width]) - tried
        fits = ((tried > 0) & (room >= 0)).all(axis=1)
        sides[waiting[fits]] = tried[fits]
        offsets[waiting[fits]] = draw.integers(0, room[fits], endpoint=True)
        waiting = waiting[~fits]
    return np.concatenate([offsets, sides], axis=1)


def _placed_matrices(side: int, size: int) -> Tensor:
    """The resize of each crop length from 0 to `side`, below `side` rows of zeros and above as many.

    So the matrix of a crop at any offset in an image is a block of `side` whole rows: see `_blocks`.

    Returns:
        Shape (side + 1, 2 * side, size), float32.
    """
    table = torch.zeros(side + 1, 2 * side, size)
    for length in range(1, side + 1):
        table[length, side : side + length] = _resize_matrix(length, size)
    return table


def _resize_matrix(length: int, size: int) -> Tensor:
    """Antialiased bicubic weights of `length` pixels in each of `size`, shape (length, size), float32.

    Rounded to fractions of 16 bits as torch's are for uint8. Unless a crop is reduced to less than about
    half, sums of their products with whole levels are exact in float32, and halves round as torch's do.
    """
    step = length / size
    centers = step * (torch.arange(size, dtype=torch.float64) + 0.5)
    pixels = torch.arange(length, dtype=torch.float64)[:, None] + 0.5
    distance = ((pixels - centers) / max(step, 1)).abs()
    near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * _A * distance - 4 * _A
    weights = near.where(distance < 1, far.where(distance < 2, 0))
    weights = weights / weights.sum(0)
    unit = 2.0 ** (_WEIGHT_BITS - math.frexp(float(weights.max()))[1])
    return ((weights * unit).round() / unit).float()


def _blocks(table: Tensor, side: int) -> Tensor:
    """View of a table as all its blocks of `side` rows, shape (..., side + 1, side + 1, side, size)."""
    return table.unfold(-2, side, 1).transpose(-1, -2)


def _to_levels(images: Tensor) -> Tensor:
    """Round to whole grey levels from 0 to 255, halves up as Pillow does, in place."""
    return images.add_(0.5).floor_().clamp_(0, 255)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Composer allows TF32, whose 11 bits are too few for the weights; on a CPU this changes nothing."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        yield
    finally:
        matmul.allow_tf32 = before
