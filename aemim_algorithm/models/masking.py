"""Patches and masks: pure functions shared by the models and the pictures.

A *mask* is a boolean tensor of shape (batch, patches) that is true where a patch is hidden. Every row
hides the same number of patches, so that the visible ones fill a dense tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from aemim_algorithm.randomness import uniform

__all__ = [
    "block_mask",
    "hidden_indices",
    "images_in",
    "mask_images",
    "mask_patch_size",
    "normalize_patches",
    "patchify",
    "pixels_of",
    "random_mask",
    "require_image_size",
    "require_mask_shape",
    "sample_seeds",
    "split_indices",
    "unpatchify",
    "upsample_mask",
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


def sample_seeds(batch: object) -> Tensor | None:
    """The seeds of a batch's samples, from which their masks are drawn, if it has them.

    Masks from the global generators depend on the number of ranks and on the size of a micro-batch; those
    from seeds belong to the samples.

    Args:
        batch: A batch; seeds are the int64 tensor of shape (batch,) under the key ``"seed"`` of a mapping.

    Returns:
        The seeds, or ``None``.
    """
    seeds = batch.get("seed") if isinstance(batch, Mapping) else None
    known = isinstance(seeds, Tensor) and seeds.dtype == torch.int64 and seeds.ndim == 1
    return seeds if known else None


def random_mask(
    batch_size: int,
    num_patches: int,
    mask_ratio: float,
    *,
    device: torch.device | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """Hide ``num_patches - int(num_patches * (1 - mask_ratio))`` patches of each image at random.

    Args:
        batch_size: Number of images.
        num_patches: Number of patches of one image.
        mask_ratio: Share of the patches to hide, in [0, 1).
        device: Where the mask is made.
        seeds: One for each image, shape (batch,), int64; ``None`` draws from the global generator.

    Returns:
        Mask of shape (batch, patches), bool, true where hidden.
    """
    noise = _draw(batch_size, num_patches, device, seeds)
    visible = noise.argsort(dim=1, stable=True)[:, : num_visible(num_patches, mask_ratio)]
    mask = torch.ones(batch_size, num_patches, dtype=torch.bool, device=noise.device)
    return mask.scatter_(1, visible, False)


def _draw(batch_size: int, count: int, device: torch.device | None, seeds: Tensor | None) -> Tensor:
    """Uniform numbers in [0, 1), shape (batch, count), float32."""
    if seeds is not None:
        return uniform(seeds, count)
    # Not torch.rand: given a generator, even None, it does not compile for a second batch size.
    return torch.empty(batch_size, count, device=device).uniform_()


def block_mask(
    batch_size: int,
    grid: tuple[int, int],
    num_hidden: int,
    *,
    min_patches: int = 16,
    max_aspect: float = 1 / 0.3,
    device: torch.device | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """Hide exactly ``num_hidden`` patches of each image in rectangles (BEiT, arXiv 2106.08254, Algorithm 1).

    Rectangles of random area, aspect ratio and place are hidden until enough is. The paper's last one may
    hide too much; here it loses rows at one side, so that every image hides the same number. As many
    random numbers are drawn for any outcome, so that nothing waits for a device.

    Args:
        batch_size: Number of images.
        grid: Rows and columns of patches.
        num_hidden: Patches to hide in each image, in [0, rows * columns].
        min_patches: Smallest area of a rectangle, in patches; the largest is what is left to hide.
        max_aspect: Largest ratio of height to width and of width to height, at least 1; its logarithm is
            drawn evenly. A rectangle longer than the image is cut to its size.
        device: Where the mask is made.
        seeds: One for each image, shape (batch,), int64; ``None`` draws from the global generator.

    Returns:
        Mask of shape (batch, patches), bool, true where hidden.
    """
    rows, columns = grid
    # So many that very few images lack a patch at the end: at 40% hidden fewer than one in 10,000.
    blocks = math.ceil(8 * min(8.0, rows * columns / max(1, rows * columns - num_hidden)))
    draws = _draw(batch_size, (blocks + 1) * 4, device, seeds).T.reshape(blocks + 1, 4, batch_size, 1, 1)
    device = draws.device
    hidden = torch.zeros(batch_size, rows, columns, dtype=torch.bool, device=device)
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)
    for area, aspect, top, left in draws[:-1]:
        missing = num_hidden - hidden.sum((1, 2), keepdim=True)
        size = min_patches + area * (missing - min_patches).clamp(min=0)
        ratio = (math.log(max_aspect) * (2 * aspect - 1)).exp()
        height = (size * ratio).sqrt().round().clamp(1, rows)
        width = (size / ratio).sqrt().round().clamp(1, columns)
        top, left = (top * (rows - height + 1)).floor(), (left * (columns - width + 1)).floor()
        block = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
        hidden |= _first(block & ~hidden, missing)
    hidden |= _first(~hidden, num_hidden - hidden.sum((1, 2), keepdim=True))
    # What was cut off lay at the bottom, so half of the masks are turned upside down.
    return torch.where(draws[-1, 0] < 0.5, hidden, hidden.flip(1)).flatten(1)


def _first(wanted: Tensor, count: Tensor) -> Tensor:
    """The first ``count`` true entries of each grid, in raster order; shape (batch, rows, columns)."""
    order = wanted.flatten(1).cumsum(1).view_as(wanted)
    return wanted & (order <= count)


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
    return split_indices(mask, count)[0]


def split_indices(mask: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    """Indices of the visible and of the hidden patches, each in raster order, from one sort.

    Args:
        mask: Shape (batch, patches), bool, true where hidden.
        num_visible: Visible patches in each row; passed in because counting on a GPU would wait for it.

    Returns:
        Of shapes (batch, ``num_visible``) and (batch, patches - ``num_visible``), int64.
    """
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :num_visible], order[:, num_visible:]


def hidden_indices(mask: Tensor, count: int) -> Tensor:
    """Indices of the hidden patches in raster order.

    Args:
        mask: Shape (batch, patches), bool, true where hidden.
        count: Hidden patches in each row.

    Returns:
        Shape (batch, count), int64.

    Raises:
        RuntimeError: If a row hides another number.
    """
    # Checked on the device: a GPU is not waited for.
    torch._assert_async((mask.sum(dim=1) == count).all(), f"every row of the mask must hide {count} patches")
    return visible_indices(~mask, count)


def upsample_mask(mask: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Give a mask of coarse patches to the finer patches that each of them covers.

    Args:
        mask: Shape (batch, rows * columns), bool or any other type.
        grid: Rows and columns of the coarse patches.
        factor: Fine patches along a side of a coarse one.

    Returns:
        Shape (batch, rows * columns * factor**2), in raster order of the fine patches.
    """
    rows, columns = grid
    blocks = mask.reshape(-1, rows, 1, columns, 1).expand(-1, -1, factor, -1, factor)
    return blocks.reshape(mask.shape[0], -1)


def require_image_size(images: Tensor, expected: Sequence[int]) -> None:
    """Raise a ValueError unless the images have this (height, width)."""
    if tuple(images.shape[-2:]) != tuple(expected):
        raise ValueError(
            f"images are {tuple(images.shape[-2:])} pixels, the encoder was built for {tuple(expected)}: "
            "resize them or build the model with image_size= that size"
        )


def require_mask_shape(mask: Tensor, expected: Sequence[int]) -> None:
    """Raise a ValueError unless the mask has this (batch, patches)."""
    if tuple(mask.shape) != tuple(expected):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(expected)} (batch, patches)")


def pixels_of(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo a normalisation, channel by channel.

    Args:
        images: Normalised, shape (batch, channels, height, width).
        mean: Of the normalisation, one value for each channel.
        std: Likewise.

    Returns:
        Pixels in [0, 1], float32, shaped as the images.
    """
    images = images.float()
    center, scale = (images.new_tensor(tuple(value))[:, None, None] for value in (mean, std))
    return (images * scale + center).clamp(0, 1)


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
    centered = patches - mean
    # On a CPU several times as fast as var(), which computes the mean again.
    variance = centered.square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
    std = (variance + 1e-6).sqrt()
    return centered / std, mean, std


def mask_patch_size(images: Tensor, mask: Tensor) -> int:
    """Side of the square patches that a mask of shape (batch, patches) cuts the images into, in pixels."""
    return math.isqrt(images.shape[-2] * images.shape[-1] // mask.shape[1])


def mask_images(images: Tensor, mask: Tensor, patch_size: int, fill: Tensor | float = 0.0) -> Tensor:
    """Paint the hidden patches of images with ``fill``; shapes as in :func:`patchify`."""
    grid = (images.shape[-2] // patch_size, images.shape[-1] // patch_size)
    hidden = mask[:, :, None].expand(-1, -1, images.shape[1] * patch_size**2)
    return torch.where(unpatchify(hidden, patch_size, grid), fill, images)
