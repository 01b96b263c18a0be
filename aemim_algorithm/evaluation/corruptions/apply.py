"""Corrupt one image, or a whole set of them as it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aemim_algorithm.evaluation.corruptions import blur, digital, noise, weather
from aemim_algorithm.evaluation.corruptions.parameters import CORRUPTIONS, SEVERITIES, TABLES
from aemim_algorithm.evaluation.corruptions.photographs import frost_photograph
from aemim_algorithm.validation import require_choice, require_integer

__all__ = ["MIN_SIZE", "Corrupted", "Images", "corrupt", "corrupted_sets"]

MIN_SIZE = 32  # pixels a side: the smallest images that any of the two tables was made for

Corruption = Callable[..., np.ndarray]

_FUNCTIONS: dict[str, Corruption] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": weather.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
}


class Images(Protocol):
    """What can be corrupted: images of one size with labels, by number."""

    classes: tuple[str, ...]
    ids: Sequence[str]

    def __len__(self) -> int:
        """How many images there are."""

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """Image of shape (3, size, size), uint8; label; number of the image."""


def corrupt(image: np.ndarray, name: str, severity: int, *, seed: int, table: str = "imagenet") -> np.ndarray:
    """Corrupt one image; a function of its arguments alone.

    Args:
        image: Shape (height, width, 3), uint8, RGB, with sides of at least 32 pixels.
        name: One of `CORRUPTIONS`.
        severity: From 1 to 5.
        seed: Decides all randomness; defocus_blur, zoom_blur, brightness, contrast, pixelate and
            jpeg_compression have none.
        table: "imagenet", the strengths for images of 224 pixels, or "cifar", those for 32.

    Returns:
        A new image, same shape, uint8. As in the official script, fractions of a grey level are cut off.

    Raises:
        ValueError: The image is of another type, shape or size, or an argument out of range; or frost is
            wanted and its photographs are not installed.
    """
    require_choice("corruption", name, CORRUPTIONS)
    require_choice("table", table, TABLES)
    _require_severity(severity)
    require_integer("seed", seed, low=0)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < MIN_SIZE:
        raise ValueError(
            f"image: got {image.dtype} of shape {image.shape}, expected uint8 of shape (height, width, 3) "
            f"with sides of at least {MIN_SIZE} pixels: resize it"
        )
    return _corrupt(image, name, severity, np.random.default_rng(seed), table)


def _corrupt(
    image: np.ndarray, name: str, severity: int, generator: np.random.Generator, table: str
) -> np.ndarray:
    function = weather.small_frost if (name, table) == ("frost", "cifar") else _FUNCTIONS[name]
    corrupted = function(image / 255, TABLES[table][name][severity - 1], generator)
    # Whole levels stay whole: no k / 255 · 255 is below k.
    return (np.clip(corrupted, 0, 1) * 255).astype(np.uint8)


class Corrupted(Dataset):
    """A set of images whose items are corrupted as they are read; stateless.

    The randomness of an item is a function of (seed, corruption, severity, number of the image), so it
    depends neither on workers nor on batches.

    Args:
        images: The clean images; their items are (image of shape (3, size, size) and uint8, label, number).
        name: One of `CORRUPTIONS`.
        severity: From 1 to 5.
        seed: At least 0.
        table: "imagenet" or "cifar", see `corrupt`.

    Raises:
        ValueError: An argument is out of range, or frost's photographs are not installed.
    """

    def __init__(
        self, images: Images, name: str, severity: int, seed: int = 0, table: str = "imagenet"
    ) -> None:
        require_choice("corruption", name, CORRUPTIONS)
        require_choice("table", table, TABLES)
        _require_severity(severity)
        require_integer("seed", seed, low=0)
        if name == "frost":  # missing photographs are to be known now, not after an hour of other corruptions
            frost_photograph(0)
        self.images, self.name, self.severity, self.seed, self.table = images, name, severity, seed, table
        self.classes, self.ids = images.classes, images.ids

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[Tensor, int, int]:
        image, label, index = self.images[position]
        corrupted = corrupt(
            image.permute(1, 2, 0).numpy(), self.name, self.severity, seed=self._seed(index), table=self.table
        )
        return torch.from_numpy(corrupted).permute(2, 0, 1).contiguous(), label, index

    def _seed(self, index: int) -> int:
        parts = (self.seed, CORRUPTIONS.index(self.name), self.severity, index)
        low, high = np.random.SeedSequence(parts).generate_state(2, np.uint64).tolist()
        return low | high << 64

    def __repr__(self) -> str:
        return f"Corrupted({self.images!r}, {self.name!r}, {self.severity}, {self.seed}, {self.table!r})"


def corrupted_sets(
    images: Images,
    *,
    table: str,
    seed: int,
    severities: Iterable[int] = SEVERITIES,
    corruptions: Iterable[str] = CORRUPTIONS,
) -> dict[tuple[str, int], Corrupted]:
    """The same images under each corruption and severity.

    Args:
        images: The clean images.
        table: "imagenet" or "cifar", see `corrupt`.
        seed: At least 0.
        severities: Some of 1 to 5.
        corruptions: Some of `CORRUPTIONS`.

    Returns:
        (corruption, severity) -> the corrupted set, which makes its images as they are asked for.

    Raises:
        ValueError: An argument is out of range, or nothing is asked for.
    """
    severities = list(severities)
    sets = {
        (name, severity): Corrupted(images, name, severity, seed, table)
        for name in corruptions
        for severity in severities
    }
    if not sets:
        raise ValueError("corruptions: got no corruption or no severity; expected at least one of each")
    return sets


def _require_severity(severity: int) -> None:
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise ValueError(f"severity={severity!r} is out of range: expected one of 1, 2, 3, 4, 5")
