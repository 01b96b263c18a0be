"""Loaders of MDS shards of images, for training and for evaluation."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from composer import DataSpec
from composer.core.data_spec import default_split_batch
from composer.utils import dist
from streaming import StreamingDataLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aemim_algorithm.data.augmentation import BatchMixing
from aemim_algorithm.data.damage import read_sample
from aemim_algorithm.data.failures import in_one_line
from aemim_algorithm.data.image_stream import ImageStream
from aemim_algorithm.data.index import open_samples
from aemim_algorithm.data.shards import DESCRIPTION
from aemim_algorithm.data.transforms import CenterCrop, Normalize
from aemim_algorithm.validation import require_integer

__all__ = [
    "EvaluationImages",
    "ImageStream",
    "class_names",
    "evaluation_data",
    "scoring_data",
    "train_data",
]

_PREFETCH = 4  # batches per worker: enough to ride out a slow shard, few enough for the memory


class EvaluationImages(Dataset[tuple[Tensor, int]]):
    """Evaluation images and labels, in the order of the shards; uses no shared memory.

    Sample `i` is `(image, label)`, the image of shape (3, image_size, image_size), uint8.

    Args:
        local: Folder of the shards.
        image_size: Side of the images, in pixels.

    Raises:
        ValueError: `local` holds no complete shards, or shards with other columns.
    """

    def __init__(self, local: str | Path, *, image_size: int) -> None:
        self._transform = CenterCrop(image_size)
        self._samples = open_samples(Path(local))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = read_sample(self._samples, index, self._samples.get_item)
        return self._transform(image), label


class _TrainingLoader(StreamingDataLoader):
    """Passes a worker's error on in one line; ends its workers at once, also when it is collected as garbage.

    Composer's DataSpec and Trainer are reference cycles. Collecting one clears the weak references
    of the workers' queues first, so "stop" never reaches a worker, and freeing the loader waits
    five seconds for each. A finalizer keeps iterator and queues alive until they are shut down.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with in_one_line():
            yield from super().__iter__()

    def _get_iterator(self) -> Any:
        iterator = super()._get_iterator()
        if self.persistent_workers:
            weakref.finalize(self, iterator._shutdown_workers)  # type: ignore[attr-defined]
        return iterator


def train_data(
    local: str | Path,
    *,
    batch_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    workers: int = 0,
    mixing: BatchMixing | None = None,
    **images: Any,
) -> DataSpec:
    """Training data for Composer's Trainer: uint8 batches, normalised on the device.

    Args:
        local: Folder of the shards; with `remote`, the folder to download them into.
        batch_size: Samples per batch and device; a last incomplete batch is dropped.
        mean: Of the pixels in [0, 1], per channel.
        std: Of the pixels in [0, 1], per channel.
        workers: Processes that decode; 0: the training process itself.
        mixing: Mixes the samples of each device's batch and normalises them, in place of `mean` and `std`.
        **images: Further arguments of `ImageStream`: `image_size`, `remote`, `seed`, ...

    Returns:
        Batches `{"image": (batch_size, 3, image_size, image_size), "label": (batch_size,), "seed":
        (batch_size,)}`, the images float32 and normalised once they reach the model, labels and seeds
        int64; with `max_broken` also "replaced", (batch_size,), int64.

    Raises:
        ValueError: As `ImageStream` and `Normalize`, or `workers` is negative. While iterating: a sample
            is not an image (`BrokenSampleError`), or a shard cannot be read (`ShardError`).
    """
    normalize = Normalize(mean, std)
    require_integer("workers", workers, low=0)
    dataset = ImageStream(local=local, batch_size=batch_size, **images)
    loader = _TrainingLoader(dataset, batch_size=batch_size, drop_last=True, **_loader_options(workers))
    if mixing is not None:
        return DataSpec(loader, microbatch_transforms=mixing.mix, split_batch=mixing.split)
    return DataSpec(loader, microbatch_transforms=normalize)


def evaluation_data(
    local: str | Path, *, image_size: int, batch_size: int, workers: int = 0
) -> DataLoader[tuple[Tensor, int]]:
    """Every image of a folder of shards once, in order, as uint8 and centre-cropped.

    Args:
        local: Folder of the shards.
        image_size: Side of the images, in pixels.
        batch_size: Images per batch; the last batch may be smaller.
        workers: Processes that decode; 0: this process.

    Returns:
        Batches of images, shape (batch, 3, image_size, image_size), uint8, and labels, shape
        (batch,), int64.

    Raises:
        ValueError: As `EvaluationImages`, or `batch_size` is below 1 or `workers` negative.
    """
    require_integer("batch_size", batch_size, low=1)
    require_integer("workers", workers, low=0)
    dataset = EvaluationImages(local, image_size=image_size)
    return DataLoader(dataset, batch_size=batch_size, **_loader_options(workers))


def scoring_data(
    images: Dataset[tuple[Tensor, int, int]], *, batch_size: int, workers: int, normalize: Normalize
) -> DataSpec:
    """Labelled images for Composer's evaluation: each counts once, on one of the processes.

    Composer leaves out what the sampler doubles so that all processes have equally many. No global generator
    is drawn from: how often a run is evaluated does not change its training.

    Args:
        images: Item `i` is (image, label, i), the image uint8; with a length.
        batch_size: Images per batch and device; the last batch may be smaller.
        workers: Processes that decode; 0: this process.
        normalize: Makes float32 images of them, on the device.

    Returns:
        Batches `{"image": (batch, 3, height, width), "label": (batch,)}`.
    """
    loader: DataLoader[Any] = DataLoader(
        images,
        batch_size=batch_size,
        sampler=dist.get_sampler(images),
        collate_fn=_labelled,
        generator=torch.Generator(),
        # Not persistent: they would take memory from training, and start in a second.
        **_loader_options(workers) | {"persistent_workers": False},
    )
    return DataSpec(loader, microbatch_transforms=normalize, split_batch=_split)


def _split(batch: Any, size: int | float) -> Any:
    """Composer's own, which warns of a last batch that is smaller than the others."""
    return default_split_batch(batch, min(size, len(batch["label"])))


def _labelled(samples: Sequence[tuple[Tensor, int, int]]) -> dict[str, Tensor]:
    images, labels, _ = zip(*samples, strict=True)
    return {"image": torch.stack(images), "label": torch.tensor(labels)}


def class_names(local: str | Path) -> list[str]:
    """The class names that `aemim data` noted beside the shards; a label is a position in them.

    Args:
        local: Folder of the shards.

    Returns:
        The names.

    Raises:
        ValueError: The folder has no such note.
    """
    try:
        description = json.loads(Path(local, DESCRIPTION).read_text(encoding="utf-8"))
        return [str(name) for name in description["classes"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{local} has no readable {DESCRIPTION}: write the shards with `aemim data`"
        ) from error


def _loader_options(workers: int) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "prefetch_factor": _PREFETCH if workers > 0 else None,
        "pin_memory": torch.cuda.is_available(),
    }
