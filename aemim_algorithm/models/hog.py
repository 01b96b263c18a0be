"""Histograms of oriented gradients (Dalal & Triggs 2005), as MaskFeat (arXiv 2112.09133) predicts them.

The paper leaves some details open; these are chosen as in the authors' published implementation:

- Each colour channel has its own gradients and its own histograms.
- Gradients are Sobel's, of the image mirrored at its border without repeating the border's pixels.
- A pixel votes with its gradient's magnitude for one of the orientation bins, which divide [0, π) evenly:
  opposite directions are one orientation, and there is no interpolation between bins or cells. Orientations
  are measured from the vertical: of nine bins the first starts at gradients straight up or down, and the
  middle of the fifth are those to the right or left. Different from the authors', the bins start 0.001
  below 0, where many gradients of 8-bit images lie: rounding noise changes no vote for them.
- The histogram of a cell in one channel is divided by its own L2 norm; a flat cell stays zero. There are no
  overlapping blocks of cells and no Gaussian window.

So the histograms are the same for normalised pixels as for raw ones: scale and offset of a channel fall out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from aemim_algorithm.models.masking import patchify

__all__ = ["hog", "hog_patches", "image_gradients"]

# How far below 0 the first bin starts, in radians.
FIRST_BIN = 1e-3


def image_gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel's gradients of every channel.

    Args:
        images: Shape (batch, channels, height, width), float.

    Returns:
        The gradients along x (to the right) and y (downwards), shaped as the images, float32.
    """
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
    # Differences come first, so that flat cells are exactly 0. Slices stay float32 under autocast and on
    # GPUs whose convolutions would round to TF32.
    across = padded[..., :, 2:] - padded[..., :, :-2]
    down = padded[..., 2:, :] - padded[..., :-2, :]
    gradient_x = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    gradient_y = down[..., :, :-2] + 2 * down[..., :, 1:-1] + down[..., :, 2:]
    return gradient_x, gradient_y


def hog(images: Tensor, *, cell_size: int = 8, orientations: int = 9) -> Tensor:
    """Histograms of oriented gradients of cells that do not overlap.

    Args:
        images: Shape (batch, channels, height, width), float, normalised or not; height and width are
            multiples of ``cell_size``.
        cell_size: Side of a cell, in pixels.
        orientations: Bins of a histogram.

    Returns:
        Shape (batch, channels, orientations, height / cell_size, width / cell_size), float32, each
        histogram of norm 1, or 0 where the cell is flat.
    """
    x, y = image_gradients(images)
    magnitude = torch.hypot(x, y)
    # From the vertical, as the authors' implementation has it: x first.
    angle = (torch.atan2(x, y) + FIRST_BIN).remainder(math.pi)
    # What lies just below the first bin may be rounded up to π itself: it belongs to the last one.
    chosen = (angle * (orientations / math.pi)).floor().clamp(max=orientations - 1)
    # One bin after the other: all at once would need as many copies of the images, and scattering is not
    # deterministic on a GPU.
    votes = [_cell_sums(magnitude * (chosen == number), cell_size) for number in range(orientations)]
    return F.normalize(torch.stack(votes, dim=2), dim=2)


def hog_patches(images: Tensor, patch_size: int, *, cell_size: int = 8, orientations: int = 9) -> Tensor:
    """The histograms of each patch side by side, MaskFeat's target.

    Args:
        images: Shape (batch, channels, height, width), float.
        patch_size: Side of a patch, in pixels, a multiple of ``cell_size``.
        cell_size: Side of a cell, in pixels.
        orientations: Bins of a histogram.

    Returns:
        Shape (batch, patches, channels * orientations * cells of a patch), float32: patches and cells in
        raster order. 108 values for a patch of 16×16 pixels.
    """
    histograms = hog(images, cell_size=cell_size, orientations=orientations).flatten(1, 2)
    return patchify(histograms, patch_size // cell_size)


def _cell_sums(values: Tensor, cell_size: int) -> Tensor:
    *lead, height, width = values.shape
    cells = values.reshape(*lead, height // cell_size, cell_size, width // cell_size, cell_size)
    return cells.sum((-3, -1))
