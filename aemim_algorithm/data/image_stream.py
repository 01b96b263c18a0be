"""Training images from MDS shards, in an order and with seeds that depend on the run alone.

Crop and seed of a sample are a function of (run seed, epoch, sample), and its place in the global batch is
one of (run seed, epoch, canonical nodes): ranks, workers and resuming in mid-epoch change neither, and no
state is saved for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from aemim_algorithm.data.cache import BoundedCache
from aemim_algorithm.data.damage import BrokenSampleError, read_sample
from aemim_algorithm.data.index import check_columns, check_shards
from aemim_algorithm.data.order import GLOBAL_BATCHES, check_divisible
from aemim_algorithm.data.remote import RETRIES, TIMEOUT, ShardStream
from aemim_algorithm.data.transforms import RandomResizedCropFlip
from aemim_algorithm.validation import require_integer

__all__ = ["ImageStream"]


class ImageStream(BoundedCache):
    """Training images, randomly cropped and mirrored, streamed from MDS shards.

    Sample `i` is `{"image": uint8 tensor of shape (3, image_size, image_size), "label": int, "seed": int}`,
    the seed being 64 random bits (signed) from which a model may draw the sample's mask. With `max_broken`
    there is "replaced": the number of the sample that was to be here and is no image, or -1.

    Args:
        local: Folder of the shards; with `remote`, the folder to download them into.
        image_size: Side of the crops, in pixels.
        batch_size: Samples per batch and device; a last incomplete global batch is dropped.
        remote: Where to download from, such as "s3://bucket/folder"; None: `local` has it all.
        seed: Decides the order, the crops and the samples' seeds.
        crop_scale: Bounds of a crop's area, as a fraction of the image's.
        shuffle: Whether to mix the samples, differently in each epoch.
        cache_limit: Bytes that downloaded shards may take, or "10gb"; None: no limit.
        verify: Whether to compare what is downloaded with the index's hashes, not only its size; None: where
            it has them. True requires them.
        download_retries: How often a failed download is repeated, after 1, 2, 4, ... seconds.
        download_timeout: Seconds that one download of one shard may take.
        canonical_nodes: Equal shares of the shards that the order of samples is made of, fixed for a run:
            the most machines that it is to run on, so that none downloads another's share. It divides the
            global batch.
        augment: Maps a crop and its own seed, at least 0, to the image that is trained on, same shape, uint8.
        num_classes: A label that is not below it is an error; None: labels are not looked at.
        max_broken: Samples that may be no images. Each is replaced by the next that is one, under its own
            label, in the crop and with the seed of the broken one. 0: the first broken one is an error.
        dist_timeout: Seconds that the processes of a machine wait for one another as an epoch starts.

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
        verify: bool | None = None,
        download_retries: int = RETRIES,
        download_timeout: float = TIMEOUT,
        canonical_nodes: int = 1,
        max_broken: int = 0,
        dist_timeout: float = 300.0,
        augment: Callable[[Tensor, int], Tensor] | None = None,
        num_classes: int | None = None,
    ) -> None:
        for name, value, low in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("canonical_nodes", canonical_nodes, 1),
            ("max_broken", max_broken, 0),
        ):
            require_integer(name, value, low=low)
        self._transform = RandomResizedCropFlip(image_size, scale=crop_scale)
        self.max_broken = max_broken
        self._augment, self._num_classes = augment, num_classes
        if remote is None:
            check_shards(Path(local))
        stream = ShardStream(
            local=local, remote=remote, retries=download_retries, timeout=download_timeout, verify=verify
        )
        super().__init__(
            streams=[stream],
            batch_size=batch_size,
            shuffle=shuffle,
            shuffle_seed=seed,
            cache_limit=cache_limit,
            num_canonical_nodes=canonical_nodes,
            dist_timeout=dist_timeout,
        )
        self.batching_method = GLOBAL_BATCHES  # the constructor would refuse what it does not know
        reader: Any
        for reader in self.shards:
            columns = zip(reader.column_names, reader.column_encodings, strict=True)
            check_columns(str(remote or local), dict(columns))
        self._set_length(batch_size, canonical_nodes)

    def _set_length(self, batch_size: int, canonical_nodes: int) -> None:
        """An epoch's samples for one rank; unlike streaming's count, without the batch that is dropped."""
        ranks = self._unique_rank_world.num_ranks
        self._global_batch_size = batch_size * ranks
        check_divisible("global batch size", self._global_batch_size, canonical_nodes)
        self.length = self.num_samples // self._global_batch_size * batch_size
        if self.length == 0:
            stream = self.streams[0]
            raise ValueError(
                f"{stream.remote or stream.local} has {self.num_samples} samples, fewer than "
                f"batch_size={batch_size} on each of {ranks} devices: lower batch_size"
            )

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """Read, decode, crop and mirror one sample (called by indexing and by iterating).

        Args:
            sample_id: Position in all shards together.
            retry: How often to try to download a missing shard.

        Returns:
            "image", shape (3, image_size, image_size), uint8; "label" and "seed", ints; with `max_broken`
            "replaced", an int.

        Raises:
            BrokenSampleError: The sample is not an image, nor are those that could replace it.
            ShardError: Its shard cannot be read.
            ValueError: Its label is outside of the classes.
        """
        image, label, source = self._first_image(int(sample_id), retry)
        self._check_label(int(sample_id), label)
        crop, seed, augmentation = _seeds(self.shuffle_seed, self._epoch(), int(sample_id))
        image = self._transform(image, crop)
        if self._augment is not None:
            image = self._augment(image, augmentation)
        sample = {"image": image, "label": label, "seed": seed}
        if self.max_broken:
            sample["replaced"] = -1 if source == sample_id else int(sample_id)
        return sample

    def _first_image(self, sample_id: int, retry: int) -> tuple[Tensor, int, int]:
        """Image, label and number of the first sample from `sample_id` on that is an image."""
        broken: list[BrokenSampleError] = []
        for step in range(self.max_broken + 1):
            candidate = (sample_id + step) % self.num_samples
            try:
                image, label = read_sample(self, candidate, partial(super().get_item, retry=retry))
            except BrokenSampleError as error:
                broken.append(error)
            else:
                return image, label, candidate
        if not self.max_broken:
            raise broken[0]
        raise BrokenSampleError(f"{broken[0]}, and as many after it as max_broken={self.max_broken} allows")

    def _check_label(self, sample_id: int, label: int) -> None:
        if self._num_classes is not None and not 0 <= label < self._num_classes:
            stream = self.streams[0]
            raise ValueError(
                f"{stream.remote or stream.local}: sample {sample_id} has the label {label}, expected one "
                f"from 0 to {self._num_classes - 1}: model.classes, or the data, is another"
            )

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """What a checkpoint keeps, as streaming counts it; between epochs, the start of the next one.

        There streaming itself names the epoch that has just ended, and a resumed run would train on its
        samples and crops once more.
        """
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            state["epoch"] = max(state["epoch"], self.next_epoch)
        return state

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Take seed, canonical nodes and place in the epoch from a checkpoint of any number of processes.

        Args:
            obj: What `state_dict` gave.

        Raises:
            ValueError: The global batch cannot be shared by the checkpoint's canonical nodes.
        """
        # Here, as all processes do: found while an epoch starts, it would leave the others waiting.
        check_divisible("global batch size", self._global_batch_size, obj["num_canonical_nodes"])
        check_divisible("sample in the epoch", obj["sample_in_epoch"], obj["num_canonical_nodes"])
        super().load_state_dict(obj)

    def _epoch(self) -> int:
        """The epoch being iterated: `next_epoch` is raised before an epoch's first sample.

        It lives in shared memory, so workers, persistent or not, and resumed runs see it too.
        """
        return max(self.next_epoch - 1, 0)


def _seeds(seed: int, epoch: int, sample_id: int) -> tuple[int, int, int]:
    """64 well-mixed bits of (seed, epoch, sample) each for crop, model (signed) and augmentation."""
    words = np.random.SeedSequence((seed, epoch, sample_id)).generate_state(3, np.uint64)
    return int(words[0]), int(words.view(np.int64)[1]), int(words[2])
