"""HOG against plain loops in float64, SciPy's Sobel filter and scikit-image's histograms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import sobel
from skimage.feature import _hog as skimage_hog
from torch import Tensor

from aemim_algorithm.data.photos import load_photos
from aemim_algorithm.models.hog import FIRST_BIN, hog, hog_patches, image_gradients


def random_images(height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def photos(count: int = 4) -> Tensor:
    """Crops of photographs, shape (count, 3, 64, 64), in [0, 1]."""
    return torch.stack([image[:, 40:104, 40:104] for image in list(load_photos().values())[:count]]) / 255


def loops(images: np.ndarray, cell: int, orientations: int) -> np.ndarray:
    """One pixel after the other, in float64."""
    batch, channels, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    out = np.zeros((batch, channels, orientations, height // cell, width // cell))
    for b, c, i, j in np.ndindex(batch, channels, height, width):
        near = padded[b, c, i : i + 3, j : j + 3]
        x = near[:, 2] @ [1, 2, 1] - near[:, 0] @ [1, 2, 1]
        y = near[2] @ [1, 2, 1] - near[0] @ [1, 2, 1]
        degrees = math.degrees(math.atan2(x, y) + FIRST_BIN) % 180  # from the vertical
        number = int(degrees // (180 / orientations))
        out[b, c, number, i // cell, j // cell] += math.sqrt(x * x + y * y)
    norm = np.sqrt((out**2).sum(2, keepdims=True))
    return out / np.maximum(norm, 1e-12)


@pytest.mark.parametrize(("cell", "orientations"), [(8, 9), (4, 9), (8, 6)])
def test_equals_plain_loops(cell: int, orientations: int) -> None:
    images = random_images()
    expected = loops(images.double().numpy(), cell, orientations)
    found = hog(images, cell_size=cell, orientations=orientations).numpy()
    assert found.shape == (2, 3, orientations, 16 // cell, 24 // cell)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_gradients_are_scipys_sobel() -> None:
    channel = random_images()[:1, :1]
    for found, axis in zip(image_gradients(channel), (1, 0), strict=True):
        expected = sobel(channel[0, 0].double().numpy(), axis=axis, mode="mirror")
        np.testing.assert_allclose(found[0, 0], expected, atol=1e-5)


def test_histograms_are_scikit_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients given, its votes, cells and normalisation are ours."""
    found = hog(photos()).numpy()
    # Its own central differences see nearly the same: the mean cosine of the cells.
    assert 0.85 < (found * _skimage(photos())).sum(2).mean() < 0.999
    monkeypatch.setattr(skimage_hog, "_hog_channel_gradient", _sobel)
    np.testing.assert_allclose(found, _skimage(photos()), atol=2e-4)


def _sobel(channel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turned by as much as our first bin starts below 0."""
    row, column = (sobel(channel, axis=axis, mode="mirror") for axis in (0, 1))
    turned = (column + 1j * row) * np.exp(1j * FIRST_BIN)
    return turned.imag.copy(), turned.real.copy()


def _skimage(images: Tensor) -> np.ndarray:
    """Its histograms of every channel, in our layout.

    It measures orientations from the horizontal, so it is given the images with rows for columns.
    """
    options: dict[str, Any] = {"block_norm": "L2", "feature_vector": False}
    channels = images.double().flatten(0, 1).mT.numpy()
    blocks = np.stack([skimage_hog.hog(channel, 9, (8, 8), (1, 1), **options) for channel in channels])
    maps = blocks[:, :, :, 0, 0].transpose(0, 3, 2, 1)
    return maps.reshape(*images.shape[:2], *maps.shape[1:])


def test_an_edge_votes_for_its_orientation() -> None:
    """A ramp at each angle from the vertical fills the one bin that holds the angle."""
    row, column = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    for number in range(9):
        angle = math.pi * (number + 0.5) / 9
        for direction in (angle, angle + math.pi):  # light to dark is the same edge as dark to light
            ramp = (row * math.cos(direction) + column * math.sin(direction)).expand(1, 1, 16, 16)
            # The mirrored border has no gradient across it, so only a cell without border is pure.
            inner = hog(torch.nn.functional.pad(ramp, (8, 8, 8, 8), mode="replicate"))[0, 0, :, 1:3, 1:3]
            assert inner.argmax(0).eq(number).all()


def test_bins_lie_as_in_the_authors_implementation() -> None:
    """It takes atan2(gradient along x, gradient along y), in units of 20 degrees, rounded down."""
    upright = torch.zeros(1, 1, 16, 16)
    upright[..., 3::7] = 0.3  # gradients to the right and to the left: 90 and -90 degrees
    assert hog(upright)[:, :, 4].eq(1).all()
    assert hog(upright.mT)[:, :, 0].eq(1).all()  # exactly on the border of a bin, and not spread over two


def test_scale_and_offset_of_a_channel_fall_out() -> None:
    images = photos()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (images - mean[:, None, None]) / std[:, None, None]
    difference = (hog(normalised) - hog(images)).abs()
    assert difference.max() < 1e-4
    assert (hog(255 * images + 3) - hog(images)).abs().max() < 1e-4
    norms = hog(images).norm(dim=2)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)
    assert not hog(torch.full((1, 3, 16, 16), 0.7)).any()


def test_a_patch_has_the_histograms_of_its_cells() -> None:
    images = random_images(32, 48)
    patches = hog_patches(images, 16)
    assert patches.shape == (2, 6, 108)
    maps = hog(images)
    for number in range(6):
        row, column = divmod(number, 3)
        cells = maps[:, :, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(patches[:, number], cells.flatten(1))
    assert hog_patches(images, 4, cell_size=4).shape == (2, 96, 27)


def test_is_float32_under_autocast() -> None:
    images = photos()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hog(images)
    assert found.dtype == torch.float32
    assert torch.equal(found, hog(images))
