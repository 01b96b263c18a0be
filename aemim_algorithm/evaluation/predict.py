"""Run a classifier over a set of images, batch by batch; nothing of a batch stays in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aemim_algorithm.classifier import Classifier
from aemim_algorithm.data.failures import in_one_line
from aemim_algorithm.data.transforms import Normalize
from aemim_algorithm.evaluation.features import evaluating
from aemim_algorithm.validation import require_choice, require_integer

__all__ = ["Clock", "PassOptions", "Predictions", "image_batches", "predict", "timed_batches"]

Batch = tuple[Tensor, Tensor, Tensor]
Precision = Literal["fp32", "amp_bf16"]


class Clock:
    """How time was spent.

    Attributes:
        images: Number of images so far.
        seconds: Wall-clock so far.
        waiting: Seconds of it in which no batch was there to compute on. With no workers that is all the
            time of reading and decoding.
    """

    def __init__(self) -> None:
        self.images, self.seconds, self.waiting = 0, 0.0, 0.0

    @property
    def share_waiting(self) -> float:
        """Share of the time spent waiting for data, 0 to 1; 0 before the first batch."""
        return self.waiting / self.seconds if self.seconds else 0.0

    def add(self, other: Clock) -> None:
        """Count another's time as well."""
        self.images += other.images
        self.seconds += other.seconds
        self.waiting += other.waiting

    def as_dict(self) -> dict[str, float | int]:
        """For JSON: `images`, `seconds`, `share_waiting`."""
        return {
            "images": self.images,
            "seconds": round(self.seconds, 3),
            "share_waiting": round(self.share_waiting, 4),
        }


class Predictions(Clock, Iterator[Batch]):
    """Iterates over (logits, labels, indices), and knows how its time was spent, the consumer's left out."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        super().__init__()
        self._batches = batches

    def __next__(self) -> Batch:
        start = time.perf_counter()
        try:
            batch = next(self._batches)
        finally:
            self.seconds += time.perf_counter() - start
        self.images += len(batch[1])
        return batch


class PassOptions(TypedDict, total=False):
    """The options of `predict`, for what passes them on."""

    batch_size: int
    workers: int
    device: torch.device | str
    precision: Precision


def predict(
    classifier: Classifier,
    image_set: Dataset[tuple[Tensor, int, int]],
    *,
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
) -> Predictions:
    """Logits of every image of a set, in its order.

    Args:
        classifier: Its model is moved to the device, and is in eval mode while the iterator runs.
        image_set: An `ImageSet`, or anything with items (uint8 image, label, index).
        batch_size: Images per forward.
        workers: Processes that decode; 0: this process.
        device: Where the model runs.
        precision: Of the forward pass; logits are float32.

    Returns:
        An iterator over logits, shape (batch, classes), float32, labels and indices, shape (batch,),
        int64, all on the CPU; it also tells the share of time spent waiting for data.

    Raises:
        ValueError: An argument is out of range. While iterating: an image or label is bad, logits are not
            finite, or their number is not that of the classifier's classes.
    """
    require_choice("precision", precision, ("fp32", "amp_bf16"))
    loader = image_batches(image_set, batch_size=batch_size, workers=workers)
    device = torch.device(device)
    result = Predictions(iter(()))
    result._batches = _logits(classifier, loader, device, precision, result)
    return result


def image_batches(
    image_set: Dataset[tuple[Tensor, int, int]], *, batch_size: int, workers: int
) -> DataLoader[tuple[Tensor, int, int]]:
    """Batches (images uint8, labels int64, indices int64) in order; the last one may be smaller.

    Raises:
        ValueError: `batch_size` is below 1, or `workers` negative.
    """
    require_integer("batch_size", batch_size, low=1)
    require_integer("workers", workers, low=0)
    return DataLoader(
        image_set,
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # A generator of its own: a loader without one draws its workers' seed from the global one.
        generator=torch.Generator().manual_seed(0),
    )


def _logits(
    classifier: Classifier,
    loader: DataLoader[tuple[Tensor, int, int]],
    device: torch.device,
    precision: str,
    clock: Predictions,
) -> Iterator[Batch]:
    model = classifier.model.to(device)
    normalize = Normalize(classifier.mean, classifier.std)
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "amp_bf16" else nullcontext()
    with evaluating(model):
        for images, labels, indices in timed_batches(loader, clock):
            # Not around the yield: what the consumer does is not to run without gradients.
            with torch.no_grad(), autocast:
                normalised, _ = normalize((images.to(device, non_blocking=True), labels))
                logits = model(normalised).float().cpu()
            _check(logits, len(labels), classifier)
            yield logits, labels, indices


def timed_batches(loader: DataLoader[tuple[Tensor, int, int]], clock: Clock) -> Iterator[Batch]:
    """A loader's batches; adds the time of waiting for them to the clock, and tells errors in one line."""
    with in_one_line():
        batches = iter(loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            clock.waiting += time.perf_counter() - start
            if batch is None:
                return
            yield batch


def _check(logits: Tensor, count: int, classifier: Classifier) -> None:
    classes = len(classifier.classes) if classifier.classes is not None else logits.shape[-1]
    if logits.shape != (count, classes):
        raise ValueError(
            f"{classifier.name}: got logits of shape {tuple(logits.shape)}, expected {(count, classes)}: "
            "one number for each class"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"{classifier.name}: its logits are not finite; has the training diverged?")
