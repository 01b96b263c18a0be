"""Training images that are decoded once and stay on the device, where whole batches are cropped.

For small images: decoding and cropping one of 32 pixels costs a CPU core as much as a small model needs to
train on it. Order, crops and seeds of an epoch are drawn as it begins, from (run seed, epoch) alone, for all
samples: ranks and resuming in mid-epoch change nothing, and no state of a generator is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from composer import DataSpec
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from aemim_algorithm.data.augmentation import BatchMixing
from aemim_algorithm.data.batch_crops import BatchCrop, random_crop_boxes
from aemim_algorithm.data.damage import locate, read_sample
from aemim_algorithm.data.index import open_samples
from aemim_algorithm.data.space import in_units
from aemim_algorithm.data.transforms import Normalize, RandomResizedCropFlip
from aemim_algorithm.validation import require_integer

__all__ = ["ResidentImages", "resident_data"]


class ResidentImages(IterableDataset[dict[str, Tensor]]):
    """Batches of randomly cropped and mirrored images, all of which are in the memory of the device.

    Yields `{"image": uint8, shape (batch_size, 3, image_size, image_size), "label": int64, "seed": int64}`,
    on the device, the seed being 64 random bits. The length is the number of batches of an epoch.

    Args:
        local: Folder of the shards; the images are of one size.
        image_size: Side of the crops, in pixels.
        batch_size: Samples per batch and device; a last incomplete global batch is dropped.
        seed: Decides the order, the crops and the samples' seeds.
        crop_scale: Bounds of a crop's area, as a fraction of the image's.
        device: Where the images stay. Each process has all of them.
        num_classes: A label that is not below it is an error; None: labels are not looked at.

    Raises:
        ValueError: `local` holds no complete shards, or shards with other columns; an argument is out of
            range; the images differ in size, or take more than half of the memory that is free; there are
            fewer than one batch on every device needs; a label is outside of the classes.
        BrokenSampleError: A sample is not an image.
        ShardError: A shard cannot be read.
    """

    def __init__(
        self,
        local: str | Path,
        *,
        image_size: int,
        batch_size: int,
        seed: int = 17,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        device: torch.device | str = "cpu",
        num_classes: int | None = None,
    ) -> None:
        require_integer("batch_size", batch_size, low=1)
        require_integer("seed", seed, low=0)
        crop = RandomResizedCropFlip(image_size, scale=crop_scale)
        self._scale, self._ratio = crop.scale, crop.ratio
        self._seed, self._batch_size = seed, batch_size
        self._rank, self._global_batch_size = dist.get_global_rank(), batch_size * dist.get_world_size()
        self._next_epoch = self._given = 0
        images, labels = _decoded(Path(local), torch.device(device), self._global_batch_size)
        _check_labels(local, labels, num_classes)
        self._images, self._labels = images.to(device), labels.to(device)
        self._crop = BatchCrop(image_size, height=images.shape[1], width=images.shape[3], device=device)

    def __len__(self) -> int:
        return len(self._images) // self._global_batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Begin the next epoch, or what a checkpoint has left of its own."""
        epoch, given = self._next_epoch, self._given
        self._next_epoch, self._given = epoch + 1, 0
        return self._batches(epoch, given)

    def _batches(self, epoch: int, given: int) -> Iterator[dict[str, Tensor]]:
        order, draws = self._draw(epoch)
        for start in range(given, len(order) - self._global_batch_size + 1, self._global_batch_size):
            first = start + self._rank * self._batch_size
            samples = order[first : first + self._batch_size]
            top_left_sides, mirrored, seeds = draws[samples].split((4, 1, 1), dim=1)
            yield {
                "image": self._crop(self._images[samples], top_left_sides, mirrored[:, 0]),
                "label": self._labels[samples],
                "seed": seeds[:, 0].contiguous(),
            }

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor]:
        """An epoch's order, shape (samples,); of each sample box, mirroring and seed, shape (samples, 6)."""
        draw = np.random.default_rng((self._seed, epoch))
        count = len(self._images)
        order = draw.permutation(count)
        boxes = random_crop_boxes(count, self._crop.height, self._crop.width, self._scale, self._ratio, draw)
        mirrored = draw.integers(0, 2, (count, 1))
        limits = np.iinfo(np.int64)
        seeds = draw.integers(limits.min, limits.max, (count, 1), endpoint=True)
        draws = np.concatenate([boxes, mirrored, seeds], axis=1)
        device = self._images.device
        return torch.from_numpy(order).to(device), torch.from_numpy(draws).to(device)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """What a checkpoint keeps; Composer asks for it.

        Args:
            num_samples: Samples that the epoch has given to all processes; 0 between epochs.
            from_beginning: Whether that counts what was given before a resume: Composer's always does.

        Returns:
            Seed and place; between epochs the start of the next one.
        """
        epoch = self._next_epoch - 1 if num_samples else self._next_epoch
        return {"resident_seed": self._seed, "epoch": epoch, "sample_in_epoch": num_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take seed and place from a checkpoint of any number of processes.

        Args:
            state: What `state_dict` gave.

        Raises:
            ValueError: The checkpoint is of a run whose images were streamed.
        """
        if "resident_seed" not in state:
            raise ValueError("the checkpoint is of a run with data.resident=false: continue it with that")
        self._seed = state["resident_seed"]
        self._next_epoch, self._given = state["epoch"], state["sample_in_epoch"]


def resident_data(
    local: str | Path,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    mixing: BatchMixing | None = None,
    augment: Callable[[Tensor, int], Tensor] | None = None,
    **images: Any,
) -> DataSpec:
    """Training data for Composer's Trainer, as `train_data` gives it, from images that stay on the device.

    Args:
        local: Folder of the shards.
        mean: Of the pixels in [0, 1], per channel.
        std: Of the pixels in [0, 1], per channel.
        mixing: Mixes the samples of each device's batch and normalises them, in place of `mean` and `std`.
        augment: None: what augments image by image does not fit here.
        **images: Further arguments of `ResidentImages`: `image_size`, `batch_size`, `device`, `seed`, ...

    Returns:
        Batches as `train_data` has them, without "replaced".

    Raises:
        ValueError: As `ResidentImages` and `Normalize`, or `augment` is given.
    """
    if augment is not None:
        raise ValueError(f"augment={augment!r}: expected None, as resident images are cropped by the batch")
    normalize = Normalize(mean, std)
    dataset = ResidentImages(local, **images)
    # A loader draws a seed for workers, though there are none: not from the global generator.
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=None, generator=torch.Generator())
    count = len(dataset) * dataset._global_batch_size
    if mixing is not None:
        return DataSpec(loader, count, microbatch_transforms=mixing.mix, split_batch=mixing.split)
    return DataSpec(loader, count, microbatch_transforms=normalize)


def _decoded(local: Path, device: torch.device, least: int) -> tuple[Tensor, Tensor]:
    """All images, shape (samples, height, 3, width), uint8, and their labels, int64, on the CPU."""
    samples = open_samples(local)
    count = len(samples)
    if count < least:
        raise ValueError(f"{local} has {count} samples, fewer than the {least} of a batch: lower batch_size")
    first, _ = read_sample(samples, 0, samples.get_item)
    _check_memory(local, count * first.numel(), device)
    _, height, width = first.shape
    images, labels = first.new_empty(count, height, 3, width), torch.empty(count, dtype=torch.int64)
    for index in range(count):
        image, labels[index] = read_sample(samples, index, samples.get_item)
        if image.shape != first.shape:
            raise ValueError(
                f"{locate(samples, index)} has {image.shape[2]}×{image.shape[1]} pixels and sample 0 "
                f"{width}×{height}: expected one size with data.resident=true; convert "
                "images to it, or set data.resident=false"
            )
        images[index] = image.transpose(0, 1)
    return images, labels


def _check_memory(local: Path, size: int, device: torch.device) -> None:
    """Refuse images that take more than half of what is free, on this machine or on the device."""
    free = {"this machine": psutil.virtual_memory().available // dist.get_local_world_size()}
    if device.type == "cuda":
        free[str(device)], _ = torch.cuda.mem_get_info(device)
    for place, available in free.items():
        if size > available / 2:
            raise ValueError(
                f"{local}: its images take {in_units(size)} decoded, more than half of the "
                f"{in_units(available)} that are free for a process on {place}: set data.resident=false"
            )


def _check_labels(local: str | Path, labels: Tensor, num_classes: int | None) -> None:
    if num_classes is None:
        return
    outside = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(outside):
        sample = int(outside[0])
        raise ValueError(
            f"{local}: sample {sample} has the label {int(labels[sample])}, expected one from 0 to "
            f"{num_classes - 1}: model.classes, or the data, is another"
        )
