"""Fixtures that several tests share."""

from __future__ import annotations

import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from aemim_algorithm.models import MAE


def normalised_images(count: int, size: int = 16, seed: int = 0) -> Tensor:
    """Images that fill the pixel range, normalised; shape (count, 3, size, size)."""
    pixels = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    pixels[0, :, 0, 0], pixels[0, :, 0, 1] = 0.0, 1.0
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    return (pixels - mean[:, None, None]) / std[:, None, None]


def tiny_mae(seed: int = 0, **overrides: object) -> MAE:
    """A MAE of two small blocks on 16×16 images in 4×4 patches."""
    torch.manual_seed(seed)
    sizes: dict[str, object] = dict(  # noqa: C408
        image_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2
    )
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    return MAE(**(sizes | decoder | overrides))  # type: ignore[arg-type]


@pytest.fixture
def images() -> Tensor:
    return normalised_images(8)
