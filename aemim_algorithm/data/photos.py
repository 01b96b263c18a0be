"""A small data set of real photographs that needs no download, for the quickstart and for tests.

scikit-image's wheel ships photographs; crops of 19 of them, labelled with which photograph they
come from, are a task on which pre-training shows within a minute on two cores. Training crops
come from the left 60% of a photograph and test crops from the right 40%: no pixel is in both.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import encode_png
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from aemim_algorithm.data.shards import Conversion, ConversionError, existing, staged, write_shards
from aemim_algorithm.data.transforms import MIN_SIDE
from aemim_algorithm.validation import require_integer

__all__ = ["PHOTOS", "crop_boxes", "load_photos", "write_photos"]

PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "microaneurysms.png",
    "moon.png",
    "motorcycle_left.png",  # not motorcycle_right.png: the same scene, a hand further
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
TRAIN_PERCENT = 60
# Wide enough to show what a photograph is of; narrower crops are texture only.
_CROP_SIDE = 64


def write_photos(
    out: str | Path, *, size: int = 32, train_crops: int = 200, test_crops: int = 60, seed: int = 0
) -> tuple[Conversion, Conversion]:
    """Write crops of the photographs as MDS shards to `out/train` and `out/test`, both or none.

    Args:
        out: The folder to make. Where it already holds just these crops, nothing is done.
        size: Side of the crops as written, in pixels. They are cut as squares of 64 pixels, or
            less where the photograph is smaller, and resized.
        train_crops: Crops per photograph in `out/train`.
        test_crops: Crops per photograph in `out/test`.
        seed: Decides the places of the crops and the order of the samples.

    Returns:
        What `out/train` and `out/test` hold.

    Raises:
        ValueError: An argument is below 1 (`seed`: below 0, `size`: below 8, the smallest that can be read
            again), scikit-image lacks a photograph, the disk is full, or something else is at `out`.
    """
    for name, value, low in (
        ("size", size, MIN_SIDE),
        ("train_crops", train_crops, 1),
        ("test_crops", test_crops, 1),
        ("seed", seed, 0),
    ):
        require_integer(name, value, low=low)
    out, crops = Path(out), {"train": train_crops, "test": test_crops}
    made_from = {
        part: {"source": "photos", "part": part, "size": size, "crops": crops[part], "seed": seed}
        for part in crops
    }
    if out.is_dir() and any(out.iterdir()):
        return _existing_parts(out, made_from)
    photos = load_photos()
    with staged(out) as stage:
        train, test = (
            write_shards(
                _samples(photos, part=part, crops=crops[part], size=size, seed=seed),
                stage / part,
                classes=tuple(photos),
                made_from=made_from[part],
            )
            for part in crops
        )
    return train, test


def _existing_parts(out: Path, made_from: dict[str, Any]) -> tuple[Conversion, Conversion]:
    train, test = (existing(out / part, made_from[part]) for part in ("train", "test"))
    if train is None or test is None:
        raise ConversionError(f"{out} is not empty: remove it or choose another folder")
    return train, test


def load_photos() -> dict[str, Tensor]:
    """The photographs by name, in the order of their labels.

    Returns:
        Images of shape (3, height, width), uint8; grey ones are repeated three times.

    Raises:
        ValueError: scikit-image is missing, or a photograph in it.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("scikit-image, whose photographs are wanted, is not installed")
    folder = Path(spec.submodule_search_locations[0], "data")
    missing = [name for name in PHOTOS if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {missing[0]}: reinstall scikit-image, version 0.25 or 0.26")
    # Not `decode`: torchvision prints a warning of libpng for three of the files.
    return {Path(name).stem: _load(folder / name) for name in PHOTOS}


def _load(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def crop_boxes(
    height: int, width: int, *, part: str, crops: int, generator: np.random.Generator
) -> list[tuple[int, int, int]]:
    """Draw the places of one photograph's crops.

    Args:
        height: Of the photograph, in pixels.
        width: Of the photograph, in pixels.
        part: "train" (left 60% of the columns) or "test" (the rest).
        crops: How many.
        generator: The source of randomness.

    Returns:
        Top, left and side of each crop, in pixels.
    """
    border = width * TRAIN_PERCENT // 100
    first, last = (0, border) if part == "train" else (border, width)
    # One side for both parts of a photograph, so that the test shows it at the same scale.
    side = min(_CROP_SIDE, height, border, width - border)
    tops = generator.integers(0, height - side + 1, crops)
    lefts = generator.integers(first, last - side + 1, crops)
    return [(int(top), int(left), side) for top, left in zip(tops, lefts, strict=True)]


def _samples(
    photos: dict[str, Tensor], *, part: str, crops: int, size: int, seed: int
) -> Iterator[tuple[bytes, int]]:
    generator = np.random.default_rng((seed, part == "test"))
    places = [
        (label, box)
        for label, photo in enumerate(photos.values())
        for box in crop_boxes(photo.shape[1], photo.shape[2], part=part, crops=crops, generator=generator)
    ]
    images = list(photos.values())
    for index in generator.permutation(len(places)).tolist():
        label, (top, left, side) = places[index]
        crop = F.resized_crop(
            images[label],
            top,
            left,
            side,
            side,
            [size, size],
            interpolation=InterpolationMode.BICUBIC,
            antialias=True,
        )
        yield encode_png(crop, compression_level=1).numpy().tobytes(), label
