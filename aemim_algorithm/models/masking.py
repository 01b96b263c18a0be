"""Patches and masks: pure functions shared by the models and the pictures.

A *mask* is a boolean tensor of shape (batch, patches) that is true where a patch is hidden. Every row
hides the same number of patches, so that the visible ones fill a dense tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "images_in",
    "mask_images",
    "normalize_patches",
    "patchify",
    "random_mask",
    "unpatchify",
    "visible_indices",
]


def images_in(batch: object) -> Tensor:
    """Find the images of a batch: its first floating-point tensor of four dimensions.

    Args:
        batch: A tensor, or a (nested) mapping, list or tuple that holds one, e.g. ``(images, labels)``.

    Returns:
        The images, shape (batch, channels, height, width).

    Raises:
        ValueError: If the batch holds no such tensor.
    """
    found = _search(batch)
    if found is None:
        raise ValueError(
            f"the batch ({type(batch).__name__}) holds no images: expected a floating-point tensor of "
            "shape (batch, channels, height, width), alone or in a tuple, list or dict; "
            "uint8 images must be normalised first"
        )
    return found


def _search(value: object) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.ndim == 4 and value.is_floating_point() else None
    if hasattr(value, "values") and callable(value.values):  # dict, UserDict, BatchFeature
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        return next((found for item in value if (found := _search(item)) is not None), None)
    return None


def random_mask(
    batch_size: int,
    num_patches: int,
    mask_ratio: float,
    *,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hide ``num_patches - int(num_patches * (1 - mask_ratio))`` patches of each image at random.

    Args:
        batch_size: Number of images.
        num_patches: Number of patches of one image.
        mask_ratio: Share of the patches to hide, in [0, 1).
        device: Where the mask is made.
        generator: Source of randomness; the global one if ``None``.

    Returns:
        Mask of shape (batch, patches), bool, true where hidden.
    """
    noise = torch.rand(batch_size, num_patches, device=device, generator=generator)
    visible = noise.argsort(dim=1)[:, : num_visible(num_patches, mask_ratio)]
    mask = torch.ones(batch_size, num_patches, dtype=torch.bool, device=device)
    return mask.scatter_(1, visible, False)


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Number of patches that a mask of this ratio leaves visible, rounded down as in MAE."""
    return int(num_patches * (1 - mask_ratio))


def visible_indices(mask: Tensor, count: int) -> Tensor:
    """Indices of the visible patches in raster order.

    Args:
        mask: Shape (batch, patches), bool, true where hidden.
        count: Visible patches in each row; passed in because counting on a GPU would wait for it.

    Returns:
        Shape (batch, count), int64.
    """
    return mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches, channels first as the weights of a patch-embedding convolution.

    Args:
        images: Shape (batch, channels, height, width); height and width multiples of ``patch_size``.
        patch_size: Side of a patch, in pixels.

    Returns:
        Shape (batch, patches, channels * patch_size**2), patches in raster order.
    """
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    grid = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Undo :func:`patchify` for a grid of (rows, columns) patches."""
    batch, rows, columns = patches.shape[0], *grid
    pixels = patches.reshape(batch, rows, columns, -1, patch_size, patch_size)
    return pixels.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, rows * patch_size, columns * patch_size)


def normalize_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each patch by its own statistics, the pixel target of MAE.

    Args:
        patches: Shape (batch, patches, pixels).

    Returns:
        The normalised patches, and the mean and the standard deviation of each, shape
        (batch, patches, 1); ``patches == normalised * std + mean``.
    """
    mean = patches.mean(dim=-1, keepdim=True)
    std = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return (patches - mean) / std, mean, std


def mask_images(images: Tensor, mask: Tensor, patch_size: int, fill: Tensor | float = 0.0) -> Tensor:
    """Paint the hidden patches of images with ``fill``; shapes as in :func:`patchify`."""
    grid = (images.shape[-2] // patch_size, images.shape[-1] // patch_size)
    hidden = mask[:, :, None].expand(-1, -1, images.shape[1] * patch_size**2)
    return torch.where(unpatchify(hidden, patch_size, grid), fill, images)
