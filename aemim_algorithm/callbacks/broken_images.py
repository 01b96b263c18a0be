"""Counts the images that could not be decoded and were replaced, and ends the run when there are too many."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from aemim_algorithm.data.damage import BrokenSampleError, locate
from aemim_algorithm.validation import require_integer

__all__ = ["BrokenImages"]


class BrokenImages(Callback):
    """Name each image that `train_data(max_broken=...)` has replaced, once, and stop at one too many.

    Logs their number as `data/broken_images`. Costs one reduction of a number over the ranks a batch, and
    nothing where `max_broken` is 0: there the first broken image ends the run by itself.

    Args:
        max_broken: Different broken images of the run that are replaced, as given to `train_data`; also over
            epochs and resumed runs.

    Raises:
        ValueError: `max_broken` is negative; while training, the batches do not tell what was replaced.
        BrokenSampleError: There are more broken images; on every rank, before the batch is trained on.
    """

    def __init__(self, max_broken: int) -> None:
        require_integer("max_broken", max_broken, low=0)
        self.max_broken = max_broken
        self._known: set[int] = set()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Look at the samples of a batch that were replaced, on all ranks."""
        if not self.max_broken:
            return
        found = self._gather(_replaced(state.batch), state) - self._known
        dataset: Any = getattr(state.train_dataloader, "dataset", None)
        for sample_id in sorted(found):
            self._count(sample_id, locate(dataset, sample_id))
        if found:
            logger.log_metrics({"data/broken_images": len(self._known)})

    def _count(self, sample_id: int, name: str) -> None:
        self._known.add(sample_id)
        count, most = len(self._known), self.max_broken
        if count > most:
            raise BrokenSampleError(
                f"{name} is no image, nor are {most} others: mend the data, or raise max_broken"
            )
        if dist.get_global_rank() == 0:
            warnings.warn(f"{name} is no image and was replaced: {count} of at most {most}", stacklevel=3)

    def _gather(self, own: list[int], state: State) -> set[int]:
        """The broken samples of all ranks; their ids travel only when there are any."""
        count = state.device.tensor_to_device(torch.tensor(len(own)))
        dist.all_reduce(count, reduce_operation="SUM")
        if not int(count):
            return set()
        return {sample_id for ids in dist.all_gather_object(own) for sample_id in ids}

    def state_dict(self) -> dict[str, Any]:
        """The samples known to be broken, so that a resumed run goes on counting."""
        return {"known": sorted(self._known)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the samples from a checkpoint."""
        self._known = set(state["known"])


def _replaced(batch: Any) -> list[int]:
    ids = batch.get("replaced") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor):
        raise ValueError(
            "BrokenImages: expected batches with the key 'replaced': pass the same max_broken to train_data, "
            "or leave the callback out"
        )
    return [sample_id for sample_id in ids.tolist() if sample_id >= 0]
