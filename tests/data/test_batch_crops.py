"""Crops of whole batches are those of single images: their pixels against torchvision, their boxes against ours."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from aemim_algorithm.data.batch_crops import BatchCrop, random_crop_boxes
from aemim_algorithm.data.transforms import random_crop_box

DRAWS = 4000


def noise(count: int, height: int, width: int, *, harsh: bool) -> Tensor:
    """Shape (count, 3, height, width); harsh: black and white only, where the kernel overshoots most."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    return (images > 127).to(torch.uint8) * 255 if harsh else images


def cropped(images: Tensor, boxes: Tensor, mirrored: Tensor, size: int) -> Tensor:
    """Ours, from images of the usual layout."""
    crop = BatchCrop(size, height=images.shape[2], width=images.shape[3], device="cpu")
    return crop(images.transpose(1, 2).contiguous(), boxes, mirrored)


def expected(images: Tensor, boxes: Tensor, mirrored: Tensor, size: int) -> Tensor:
    """Torchvision's, one by one."""
    crops = [
        F.resized_crop(image, *box, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True)
        for image, box in zip(images, boxes.tolist(), strict=True)
    ]
    return torch.stack([x.flip(-1) if flip else x for x, flip in zip(crops, mirrored, strict=True)])


@pytest.mark.parametrize("harsh", [False, True], ids=["grey", "black and white"])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(32, 32, 32), (20, 33, 16), (64, 48, 24), (12, 12, 30), (9, 40, 8), (8, 8, 2)],
    ids=str,
)
def test_random_boxes_give_the_pixels_of_torchvision(height: int, width: int, size: int, harsh: bool) -> None:
    images = noise(150, height, width, harsh=harsh)
    boxes = random_crop_boxes(150, height, width, (0.02, 1.0), (0.4, 2.5), np.random.default_rng(0))
    mirrored = torch.arange(150) % 2
    ours = cropped(images, torch.from_numpy(boxes), mirrored, size)
    assert (ours.dtype, ours.shape, ours.is_contiguous()) == (torch.uint8, (150, 3, size, size), True)
    assert ours.equal(expected(images, torch.from_numpy(boxes), mirrored, size))


@pytest.mark.parametrize("size", [5, 16, 40])
def test_every_side_of_a_crop_at_every_border_gives_the_pixels_of_torchvision(size: int) -> None:
    side = 24
    corners = [
        (top, left, rows, columns)
        for rows in range(1, side + 1)
        for columns in (rows, side + 1 - rows)
        for top, left in ((0, side - columns), (side - rows, 0))
    ]
    boxes, images = torch.tensor(corners), noise(len(corners), side, side, harsh=False)
    mirrored = torch.zeros(len(corners), dtype=torch.int64)
    assert cropped(images, boxes, mirrored, size).equal(expected(images, boxes, mirrored, size))


def test_the_precision_of_a_run_stays_as_it_is() -> None:
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        cropped(noise(1, 8, 8, harsh=False), torch.tensor([[0, 0, 8, 8]]), torch.tensor([0]), 8)
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before


def test_an_image_that_is_not_cropped_stays_as_it_is() -> None:
    images, boxes = noise(2, 16, 16, harsh=False), torch.tensor([[0, 0, 16, 16]] * 2)
    ours = cropped(images, boxes, torch.tensor([0, 1]), 16)
    assert ours.equal(torch.stack([images[0], images[1].flip(-1)]))


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (32, 32, (0.2, 1.0), (3 / 4, 4 / 3)),
        (50, 20, (0.08, 1.0), (3 / 4, 4 / 3)),
        (224, 300, (0.2, 1.0), (0.5, 2.0)),
        (40, 17, (0.5, 1.0), (3 / 4, 4 / 3)),  # about a third end in the middle
    ],
    ids=["square", "tall", "wide", "few fit"],
)
def test_boxes_are_distributed_as_those_drawn_one_by_one(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    draw = random.Random(0)
    singly = np.array([random_crop_box(height, width, scale, ratio, draw) for _ in range(DRAWS)])
    together = random_crop_boxes(DRAWS, height, width, scale, ratio, np.random.default_rng(0))
    assert together.dtype == np.int64
    assert (together >= 0).all()
    assert (together[:, :2] + together[:, 2:] <= (height, width)).all()
    for name, ours in features(together, height, width).items():
        other = features(singly, height, width)[name]
        assert ks_2samp(ours, other, method="asymp").pvalue > 0.01, name


def features(boxes: NDArray[np.int64], height: int, width: int) -> dict[str, NDArray[np.float64]]:
    """Of each box what its distribution is compared by."""
    top, left, rows, columns = boxes.T.astype(float)
    return {
        "area": rows * columns,
        "log ratio": np.log(columns / rows),
        "top": top / np.maximum(height - rows, 1),
        "left": left / np.maximum(width - columns, 1),
        "offset from the middle": np.hypot(top - (height - rows) / 2, left - (width - columns) / 2),
    }


@pytest.mark.parametrize(("height", "width"), [(8, 80), (80, 8), (30, 30)])
def test_where_no_crop_fits_it_is_the_middle_one(height: int, width: int) -> None:
    scale, ratio = (1.0, 1.0), (1.2, 1.3)
    singly = random_crop_box(height, width, scale, ratio, random.Random(0))
    together = random_crop_boxes(5, height, width, scale, ratio, np.random.default_rng(0))
    assert together.tolist() == [[*singly]] * 5


@pytest.mark.parametrize("name", ["image_size", "height", "width"])
def test_a_size_below_one_is_refused(name: str) -> None:
    sizes = {"image_size": 8, "height": 8, "width": 8} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}=0 is out of range"):
        BatchCrop(**sizes, device="cpu")
