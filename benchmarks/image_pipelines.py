"""Three ways from image files to training batches: the original MAE's, and ours from two kinds of shards."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from aemim_algorithm.data.convert import convert
from aemim_algorithm.data.streaming import train_data
from aemim_algorithm.data.transforms import RandomResizedCropFlip, decode, random_crop_box

__all__ = [
    "CROP_RATIO",
    "CROP_SCALE",
    "FULL",
    "IMAGE_SIZE",
    "PIL",
    "RESIZED",
    "STAGES",
    "Pipeline",
    "Seconds",
    "build",
    "grey_levels",
    "shard_pipeline",
    "timed",
    "write_shards",
]

IMAGE_SIZE = 224
CROP_SCALE = (0.2, 1.0)  # as MAE pre-trains; the ratio is torchvision's and ours by default
CROP_RATIO = (3 / 4, 4 / 3)
STAGES = ("images", "batches", "normalised batches")
PIL, FULL, RESIZED = "PIL image folder", "shards, full size", "shards, resize 256"

Seconds = dict[str, list[float]]  # "cpu" and "wall", one of each round, per image


@dataclass(frozen=True)
class Pipeline:
    """One way from files to training images: ``dataset[i]`` is one, ``batches`` are an epoch of them."""

    dataset: Dataset[Any]
    batches: Iterable[Any]
    normalize: Any = None

    def run(self, stage: str) -> Iterator[int]:
        """The number of images of each piece of work, as it is done."""
        if stage == "images":
            for index in torch.randperm(len(self.dataset)).tolist():  # type: ignore[arg-type]
                self.dataset[index]
                yield 1
            return
        normalize = self.normalize if stage == "normalised batches" else None
        for batch in self.batches:
            finished = normalize(batch) if normalize else batch
            yield len(finished["image"] if isinstance(finished, dict) else finished[0])


def pil_pipeline(folder: Path, batch_size: int) -> Pipeline:
    """The pre-training transform that the MAE paper describes, from torchvision's parts."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                IMAGE_SIZE, scale=CROP_SCALE, interpolation=InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )
    dataset = ImageFolder(str(folder), transform)
    return Pipeline(dataset, DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=True))


def shard_pipeline(shards: Path, batch_size: int, seed: int, workers: int = 0) -> Pipeline:
    """What a recipe trains from."""
    spec = train_data(
        shards,
        image_size=IMAGE_SIZE,
        batch_size=batch_size,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        seed=seed,
        crop_scale=CROP_SCALE,
        workers=workers,
    )
    loader: Any = spec.dataloader
    return Pipeline(loader.dataset, loader, spec.microbatch_transforms)


def write_shards(folder: Path, scratch: Path) -> dict[str, Path]:
    """Shards of the files as they are, and of resized ones."""
    shards = {FULL: scratch / "shards-full", RESIZED: scratch / "shards-256"}
    convert(folder, shards[FULL], resize=None, progress=False)
    convert(folder, shards[RESIZED], resize=256, progress=False)
    return shards


def build(folder: Path, shards: dict[str, Path], batch_size: int, seed: int) -> dict[str, Pipeline]:
    """The three pipelines."""
    ours = {name: shard_pipeline(place, batch_size, seed) for name, place in shards.items()}
    return {PIL: pil_pipeline(folder, batch_size)} | ours


def timed(work: Iterator[int], skip: int = 1) -> dict[str, float]:
    """Seconds per image of processor and wall time, after the first pieces of work.

    Args:
        work: The number of images of each piece, as it is done.
        skip: Pieces that do not count. The loader starts its workers for the first one; when there are as
            many as workers, all that the others have made in the meantime is there, too.
    """
    for _ in itertools.islice(work, skip):
        pass
    cpu, wall = _processor_seconds(), time.perf_counter()
    images = sum(work)
    return {
        "cpu": (_processor_seconds() - cpu) / images,
        "wall": (time.perf_counter() - wall) / images,
    }


def _processor_seconds() -> float:
    """Of this process and of the workers that live."""
    workers = [child.cpu_times() for child in psutil.Process().children()]
    return time.process_time() + sum(times.user + times.system for times in workers)


def grey_levels(files: Sequence[str], seed: int) -> list[float]:
    """How far ours is from PIL's pixels under the same crop boxes and mirroring.

    Args:
        files: Image files.
        seed: Of the crops.

    Returns:
        For each file the mean absolute difference, in 1/255.
    """
    crop_and_flip = RandomResizedCropFlip(IMAGE_SIZE, scale=CROP_SCALE, ratio=CROP_RATIO)
    differences = []
    for number, file in enumerate(files):
        ours = crop_and_flip(decode(Path(file).read_bytes()), seed + number)
        draw = random.Random(seed + number)
        with Image.open(file) as image:
            theirs = image.convert("RGB")
        box = random_crop_box(theirs.height, theirs.width, CROP_SCALE, CROP_RATIO, draw)
        theirs = F.resized_crop(theirs, *box, [IMAGE_SIZE, IMAGE_SIZE], InterpolationMode.BICUBIC)
        theirs = F.hflip(theirs) if draw.random() < 0.5 else theirs
        levels = np.asarray(theirs, np.int16) - ours.permute(1, 2, 0).numpy().astype(np.int16)
        differences.append(float(np.abs(levels).mean()))
    return differences
