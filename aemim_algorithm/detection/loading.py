"""Batches of images with their objects for Composer's Trainer: lists, as no two images are of one size.

The order of an epoch and which images are mirrored follow from (run seed, epoch) and (run seed, epoch, image)
alone: processes, workers and resuming in mid-epoch change neither. A global batch holds wide images or tall
ones, where there are enough of them, so that little is padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from composer import DataSpec
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from aemim_algorithm.data.detection_images import DetectionImages
from aemim_algorithm.data.failures import in_one_line
from aemim_algorithm.validation import require_integer

__all__ = ["GlobalBatches", "TrainingObjects", "mirrored", "scoring_objects", "training_objects"]

Target = dict[str, Any]
Drawn = tuple[int, int]  # epoch, image


class TrainingObjects(Dataset[tuple[Tensor, Target]]):
    """Images to train on, half of them mirrored; an item is asked for by its epoch and its number.

    Args:
        images: With a length and the sizes of its items.
        seed: Decides which image is mirrored in which epoch.
    """

    def __init__(self, images: DetectionImages, *, seed: int) -> None:
        self.images, self.given = images, 0
        self._seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, drawn: Drawn) -> tuple[Tensor, Target]:
        epoch, index = drawn
        image, target = self.images[index]
        draw = np.random.SeedSequence((self._seed, epoch, index)).generate_state(1)
        return mirrored(image, target) if draw[0] % 2 else (image, target)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """What a checkpoint keeps; Composer asks for it.

        Args:
            num_samples: Samples that the epoch has given to all processes; 0 between epochs.
            from_beginning: Whether that counts what was given before a resume: Composer's always does.
        """
        return {"samples_in_epoch": num_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the place in the epoch from a checkpoint of any number of processes."""
        self.given = state["samples_in_epoch"]


class GlobalBatches(DistributedSampler[list[Drawn]]):
    """What this process reads of each global batch of an epoch; Composer tells it the epoch.

    Args:
        objects: What is read.
        batch_size: Images of one process and optimizer step. Left-over images of an epoch are left out.
        seed: Decides the order.

    Raises:
        ValueError: There are fewer images than a global batch has.
    """

    def __init__(self, objects: TrainingObjects, *, batch_size: int, seed: int) -> None:
        super().__init__(objects, num_replicas=dist.get_world_size(), rank=dist.get_global_rank(), seed=seed)
        self._batch_size, self._global_batch_size = batch_size, batch_size * self.num_replicas
        self._wide = np.array([width >= height for height, width in objects.images.sizes])
        if len(objects) < self._global_batch_size:
            raise ValueError(
                f"there are {len(objects)} images with objects, fewer than the {self._global_batch_size} of "
                "a global batch: lower global_batch_size"
            )

    def __len__(self) -> int:
        return len(self._wide) // self._global_batch_size

    def __iter__(self) -> Iterator[list[Drawn]]:
        objects: Any = self.dataset
        done, objects.given = objects.given // self._global_batch_size, 0
        first = self.rank * self._batch_size
        for batch in self._order()[done:]:
            yield [(self.epoch, int(index)) for index in batch[first : first + self._batch_size]]

    def _order(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The epoch's global batches, shape (batches, images); of one orientation each, but for the last."""
        draw = np.random.default_rng((self.seed, self.epoch))
        order, size = draw.permutation(len(self._wide)), self._global_batch_size
        sides = [order[self._wide[order] == wide] for wide in (True, False)]
        whole = [side[: len(side) // size * size] for side in sides]
        rest = np.concatenate([side[len(kept) :] for side, kept in zip(sides, whole, strict=True)])
        mixed = draw.permutation(rest)[: len(rest) // size * size]
        return draw.permutation(np.concatenate([*whole, mixed]).reshape(-1, size))


def training_objects(images: DetectionImages, *, batch_size: int, seed: int, workers: int = 0) -> DataSpec:
    """Training data for Composer's Trainer.

    Args:
        images: What to train on.
        batch_size: Images per batch and process; a last incomplete batch is dropped.
        seed: Decides the order and the mirroring.
        workers: Processes that decode; 0: the training process itself.

    Returns:
        Batches ``{"image": [...], "target": [...]}``, as `DetectionImages` has them.

    Raises:
        ValueError: As `GlobalBatches`, or `workers` is negative.
    """
    require_integer("workers", workers, low=0)
    objects = TrainingObjects(images, seed=seed)
    batches = GlobalBatches(objects, batch_size=batch_size, seed=seed)
    loader = _Loader(objects, batch_sampler=batches, **_options(workers), persistent_workers=workers > 0)
    samples = len(batches) * batch_size * dist.get_world_size()
    return _spec(loader, samples)


def scoring_objects(images: DetectionImages, *, batch_size: int, workers: int = 0) -> DataSpec:
    """All images for Composer's evaluation, each once, on one of the processes.

    Args:
        images: What to score on.
        batch_size: Images per batch and process; the last batch may be smaller.
        workers: Processes that decode; 0: this process.

    Returns:
        Batches as `training_objects` has them, the last one smaller where they do not fit.
    """
    loader = _Loader(images, batch_size=batch_size, sampler=dist.get_sampler(images), **_options(workers))
    return _spec(loader, len(images))


def mirrored(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """An image and its objects, with left and right exchanged."""
    left, top, right, bottom = target["boxes"].unbind(1)
    width = image.shape[-1]
    boxes = torch.stack([width - right, top, width - left, bottom], dim=1)
    return image.flip(-1), target | {"boxes": boxes, "masks": target["masks"].flip(-1)}


class _Loader(DataLoader[Any]):
    """Passes a worker's error on in one line."""

    def __iter__(self) -> Any:
        with in_one_line():
            yield from super().__iter__()


def _options(workers: int) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "collate_fn": _listed,
        "generator": torch.Generator(),  # a loader draws a seed for workers: not from the global one
        "pin_memory": torch.cuda.is_available(),
    }


def _spec(loader: DataLoader[Any], samples: int) -> DataSpec:
    return DataSpec(loader, samples, split_batch=_split, get_num_samples_in_batch=_count)


def _listed(samples: Sequence[tuple[Tensor, Target]]) -> dict[str, list[Any]]:
    images, targets = zip(*samples, strict=True)
    return {"image": [*images], "target": [*targets]}


def _split(batch: dict[str, list[Any]], size: int | float) -> list[dict[str, list[Any]]]:
    """Micro-batches of a batch; the last may be smaller."""
    starts = range(0, _count(batch), int(size))
    return [{key: values[start : start + int(size)] for key, values in batch.items()} for start in starts]


def _count(batch: dict[str, list[Any]]) -> int:
    return len(batch["image"])
