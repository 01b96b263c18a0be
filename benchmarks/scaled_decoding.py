"""What it would save to let libjpeg decode at half size where a crop is larger than needed anyway.

Its inverse cosine transform can give every block of 8×8 pixels as 4×4, in about half of the time. That loses
nothing that matters where the crop is at least twice as large as the image it becomes.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_pipelines import CROP_RATIO, CROP_SCALE, IMAGE_SIZE, timed
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from turns import ratios, rotated

from aemim_algorithm.data.transforms import decode, random_crop_box

__all__ = ["crops", "scaled_decoding"]

Box = tuple[int, int, int, int]


def crops(data: bytes, box: Box) -> tuple[Tensor, Tensor]:
    """A training crop, decoded in full, and from an image that libjpeg decodes at half size if that will do.

    Args:
        data: A JPEG.
        box: Top, left, height and width, in pixels.

    Returns:
        Both, shape (3, 224, 224), uint8.
    """
    exact = _crop(decode(data), box)
    return exact, _scaled_crop(data, box) if _scales(box) else exact


def scaled_decoding(files: Sequence[str], seed: int, rounds: int) -> dict[str, Any]:
    """What libjpeg's decoding at half size would save, at the crops that MAE draws.

    Args:
        files: JPEGs and others.
        seed: Of the crops.
        rounds: Passes over the files.

    Returns:
        ``share`` of the crops that are at least twice as large as what they become, and ``ratios``, one a
        round: time of all images in full over that of scaling where it will do.
    """
    images = []
    for number, file in enumerate(files):
        data = Path(file).read_bytes()
        with Image.open(BytesIO(data)) as image:
            draw = random.Random(seed + number)
            box = random_crop_box(image.height, image.width, CROP_SCALE, CROP_RATIO, draw)
            images.append((data, box, image.format == "JPEG" and _scales(box)))
    found: dict[str, list[float]] = {"in full": [], "scaled": []}
    for round_number in range(rounds):
        for way in rotated([*found], round_number):
            found[way].append(timed(_cropped(images, scaled=way == "scaled"), skip=0)["cpu"])
    return {
        "share": statistics.mean(fits for _, _, fits in images),
        "ratios": ratios(found["in full"], found["scaled"]),
    }


def _cropped(images: Sequence[tuple[bytes, Box, bool]], *, scaled: bool) -> Iterator[int]:
    for data, box, fits in images:
        if scaled and fits:
            _scaled_crop(data, box)
        else:
            _crop(decode(data), box)
        yield 1


def _scales(box: Box) -> bool:
    return min(box[2:]) >= 2 * IMAGE_SIZE


def _scaled_crop(data: bytes, box: Box) -> Tensor:
    with Image.open(BytesIO(data)) as image:
        image.draft("RGB", ((image.width + 1) // 2, (image.height + 1) // 2))
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    top, left, height, width = (side // 2 for side in box)
    return _crop(pixels, (top, left, height, width))


def _crop(image: Tensor, box: Box) -> Tensor:
    size = [IMAGE_SIZE, IMAGE_SIZE]
    return F.resized_crop(image, *box, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
