"""Reading MDS shards of images, for training with `StreamingDataset` and for evaluation.

The crop of a training image is a function of (seed, epoch, sample), like the noise of the attack:
ranks, workers and resuming in mid-epoch do not change it, and no state is saved for it.
"""

from __future__ import annotations

import json
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer import DataSpec
from streaming import LocalDataset, StreamingDataLoader, StreamingDataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aemim_algorithm.data.shards import DESCRIPTION, check_columns, check_shards
from aemim_algorithm.data.transforms import CenterCrop, Normalize, RandomResizedCropFlip, decode
from aemim_algorithm.validation import require_integer

__all__ = ["EvaluationImages", "ImageStream", "class_names", "evaluation_data", "train_data"]

_PREFETCH = 4  # batches per worker: enough to ride out a slow shard, few enough for the memory


class ImageStream(StreamingDataset):
    """Training images, randomly cropped and mirrored, streamed from MDS shards.

    Sample `i` is `{"image": uint8 tensor of shape (3, image_size, image_size), "label": int}`.

    Args:
        local: Folder of the shards; with `remote`, the folder to download them into.
        image_size: Side of the crops, in pixels.
        batch_size: Samples per batch and device; needed for an order that can be resumed.
        remote: Where to download from, such as "s3://bucket/folder"; None: `local` has it all.
        seed: Decides the order and the crops.
        crop_scale: Bounds of a crop's area, as a fraction of the image's.
        shuffle: Whether to mix the samples, differently in each epoch.
        cache_limit: Bytes that downloaded shards may take, or "10gb"; None: no limit.

    Raises:
        ValueError: `local` holds no complete shards, or shards with other columns; an argument is
            out of range; there are fewer samples than one batch on every device needs.
    """

    def __init__(
        self,
        *,
        local: str | Path,
        image_size: int,
        batch_size: int,
        remote: str | None = None,
        seed: int = 17,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        shuffle: bool = True,
        cache_limit: int | str | None = None,
    ) -> None:
        require_integer("batch_size", batch_size, low=1)
        require_integer("seed", seed, low=0)
        self._transform = RandomResizedCropFlip(image_size, scale=crop_scale)
        if remote is None:
            check_shards(Path(local))
        super().__init__(
            local=str(local),
            remote=remote,
            batch_size=batch_size,
            shuffle=shuffle,
            shuffle_seed=seed,
            cache_limit=cache_limit,
        )
        reader: Any = self.shards[0]
        check_columns(str(remote or local), reader.column_names)
        if len(self) < batch_size:
            raise ValueError(
                f"{remote or local} has {self.num_samples} samples, {len(self)} per device, "
                f"fewer than batch_size={batch_size}: lower batch_size"
            )

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """Read, decode, crop and mirror one sample (called by indexing and by iterating).

        Args:
            sample_id: Position in all shards together.
            retry: How often to try to download a missing shard.

        Returns:
            "image", shape (3, image_size, image_size), uint8; "label", an int.

        Raises:
            ValueError: The sample is not an image.
        """
        sample = super().get_item(sample_id, retry)
        image = _decode(sample, sample_id, self.streams[0].local)
        seed = _crop_seed(self.shuffle_seed, self._epoch(), int(sample_id))
        return {"image": self._transform(image, seed), "label": int(sample["label"])}

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """What a checkpoint keeps, as streaming counts it; between epochs, the start of the next one.

        There streaming itself names the epoch that has just ended, and a resumed run would train on its
        samples and crops once more.
        """
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            state["epoch"] = max(state["epoch"], self.next_epoch)
        return state

    def _epoch(self) -> int:
        """The epoch being iterated: `next_epoch` is raised before an epoch's first sample.

        It lives in shared memory, so workers, persistent or not, and resumed runs see it too.
        """
        return max(self.next_epoch - 1, 0)


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
        shards = check_shards(Path(local))
        check_columns(str(local), shards[0]["column_names"])
        with warnings.catch_warnings():  # LocalDataset leaves index.json open
            warnings.simplefilter("ignore", ResourceWarning)
            self._samples = LocalDataset(str(local))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        sample = self._samples[index]
        image = _decode(sample, index, self._samples.local)
        return self._transform(image), int(sample["label"])


class _TrainingLoader(StreamingDataLoader):
    """Ends its persistent workers at once, also when the garbage collector frees it.

    Composer's DataSpec and Trainer are reference cycles. Collecting one clears the weak references
    of the workers' queues first, so "stop" never reaches a worker, and freeing the loader waits
    five seconds for each. A finalizer keeps iterator and queues alive until they are shut down.
    """

    def _get_iterator(self) -> Any:
        iterator = super()._get_iterator()
        if self.persistent_workers:
            weakref.finalize(self, iterator._shutdown_workers)  # type: ignore[attr-defined]
        return iterator


def train_data(
    local: str | Path,
    *,
    image_size: int,
    batch_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    remote: str | None = None,
    seed: int = 17,
    workers: int = 0,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    shuffle: bool = True,
    cache_limit: int | str | None = None,
) -> DataSpec:
    """Training data for Composer's Trainer: uint8 batches, normalised on the device.

    Args:
        local: See `ImageStream`, as for `image_size`, `remote`, `seed`, `crop_scale`, `shuffle`
            and `cache_limit`.
        image_size: Side of the crops, in pixels.
        batch_size: Samples per batch and device; a last incomplete batch is dropped.
        mean: Of the pixels in [0, 1], per channel.
        std: Of the pixels in [0, 1], per channel.
        remote: Where to download the shards from.
        seed: Decides the order and the crops.
        workers: Processes that decode; 0: the training process itself.
        crop_scale: Bounds of a crop's area, as a fraction of the image's.
        shuffle: Whether to mix the samples.
        cache_limit: Bytes that downloaded shards may take.

    Returns:
        Batches `{"image": (batch_size, 3, image_size, image_size), "label": (batch_size,)}`, the
        images float32 and normalised once they reach the model.

    Raises:
        ValueError: As `ImageStream` and `Normalize`, or `workers` is negative.
    """
    normalize = Normalize(mean, std)
    require_integer("workers", workers, low=0)
    dataset = ImageStream(
        local=local,
        image_size=image_size,
        batch_size=batch_size,
        remote=remote,
        seed=seed,
        crop_scale=crop_scale,
        shuffle=shuffle,
        cache_limit=cache_limit,
    )
    loader = _TrainingLoader(dataset, batch_size=batch_size, drop_last=True, **_loader_options(workers))
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


def _crop_seed(seed: int, epoch: int, sample_id: int) -> int:
    """64 well-mixed bits of (seed, epoch, sample)."""
    return int(np.random.SeedSequence((seed, epoch, sample_id)).generate_state(1, np.uint64)[0])


def _decode(sample: dict[str, Any], sample_id: int, folder: str) -> Tensor:
    try:
        return decode(sample["image"])
    except ValueError as error:
        raise ValueError(f"{folder}, sample {sample_id}: {error}") from error
