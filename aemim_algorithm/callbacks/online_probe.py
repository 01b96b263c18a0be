"""How good the frozen features are while pre-training: k-NN and a linear probe, outside of the training time.

A probe runs at the end of a batch or an epoch. Composer counts what happens there into the next batch, so its
seconds are owed until that batch ends and are then taken off Composer's clock, before anything logs it. They
are in no checkpoint: what a checkpoint holds is the clock of a moment before the probe.

Cost: one encoder forward for each image and the two probes, each time, on the first process while the others
wait; images are decoded once and kept as uint8, 3 * image_size ** 2 bytes each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from composer.core import Callback, Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import create_interval_scheduler
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from aemim_algorithm.data.streaming import EvaluationImages
from aemim_algorithm.data.transforms import Normalize
from aemim_algorithm.evaluation.features import extract_features
from aemim_algorithm.evaluation.frozen import relabelled, training_labels
from aemim_algorithm.evaluation.knn import knn_accuracy
from aemim_algorithm.evaluation.linear_probe import linear_probe_accuracy
from aemim_algorithm.first_rank import on_first_rank
from aemim_algorithm.randomness import RngState
from aemim_algorithm.sharding import unwrapped
from aemim_algorithm.validation import require_integer, require_number, require_per_channel

__all__ = ["OnlineProbe", "spread"]

Split = tuple[Tensor, Tensor]  # images, or their features, and labels


class OnlineProbe(Callback):
    """Log ``metrics/probe/knn`` and ``metrics/probe/linear``, top-1 in percent, at an interval.

    Scored are the average patch tokens of ``model.encoder`` in eval mode, float32, without adversarial
    copies: the encoder that the export writes. Training with it is bit for bit training without it.

    Args:
        interval: Time between two probes, e.g. ``"1ep"`` or ``"200ba"``; also probed once at the end.
        train: Folder of MDS shards that the probes learn from; also given later, by :meth:`set_folders`.
        test: Folder of MDS shards that they are scored on, likewise.
        image_size: Side of the square images that the encoder sees, in pixels.
        mean: Mean of the images' normalisation, one value for each channel.
        std: Standard deviation of the images' normalisation, likewise.
        train_images: Images to learn from, at most, spread evenly over the shards; ``None``: all.
        test_images: Images to score on, likewise.
        batch_size: Images of one forward.
        k: Neighbours that vote, at most the training images.
        temperature: Of their votes, > 0.
        weight_decay: Of the linear probe, > 0.
        at_start: Whether to probe before the first batch, too.

    Raises:
        ValueError: If an argument is out of range; at ``INIT`` if the model, its parallelism or the folders
            do not fit; at the start of training if the images do not.
    """

    def __init__(
        self,
        *,
        interval: str | int | Time = "1ep",
        train: str | Path | None = None,
        test: str | Path | None = None,
        image_size: int = 224,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
        train_images: int | None = 5000,
        test_images: int | None = 2000,
        batch_size: int = 128,
        k: int = 20,
        temperature: float = 0.07,
        weight_decay: float = 1e-3,
        at_start: bool = False,
    ) -> None:
        for name, value in {"image_size": image_size, "batch_size": batch_size, "k": k}.items():
            require_integer(name, value, low=1)
        for name, most in {"train_images": train_images, "test_images": test_images}.items():
            if most is not None:
                require_integer(name, most, low=1)
        if train_images is not None and k > train_images:
            raise ValueError(f"k={k} is out of range: expected at most train_images={train_images}")
        require_per_channel("mean", mean)
        require_per_channel("std", std, positive=True)
        require_number("temperature", temperature, low=0, low_open=True)
        require_number("weight_decay", weight_decay, low=0, low_open=True)
        self.image_size, self.batch_size, self.at_start = image_size, batch_size, at_start
        self.k, self.temperature, self.weight_decay = k, temperature, weight_decay
        self.train, self.test = train, test
        self._limits = {"train": train_images, "test": test_images}
        self._normalize = Normalize(mean, std)
        self._due = _schedule(interval)
        self._split: dict[str, Split] = {}
        self._probed_at = -1
        self._owed = 0.0

    def set_folders(self, train: str | Path, test: str | Path | None) -> None:
        """Take these folders of shards where none were given.

        Args:
            train: Folder of the training shards.
            test: Folder of the test shards, if there are any.
        """
        self.train, self.test = self.train or train, self.test or test

    def init(self, state: State, logger: Logger) -> None:
        """Refuse a model, a parallelism and folders that cannot be probed."""
        model = unwrapped(state.model)
        if not isinstance(getattr(model, "encoder", None), nn.Module):
            raise ValueError(
                f"OnlineProbe cannot probe {type(model).__name__}: the model needs an encoder, the module "
                "model.encoder; drop the callback"
            )
        if state.fsdp_config is not None:
            raise ValueError(
                "OnlineProbe cannot probe a model whose weights FSDP shards: use DDP, or drop the callback "
                "and run `aemim probe` afterwards"
            )
        for name in ("train", "test"):
            if getattr(self, name) is None:
                raise ValueError(f"OnlineProbe: {name}=None; expected a folder of MDS shards with labels")
        on_first_rank(self._check)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Decode the images, see that the encoder takes them, and probe if that is wanted.

        Composer's clock starts after this event.
        """
        on_first_rank(lambda: self._prepare(state))
        self._probed_at = -1
        if self.at_start and state.timestamp.batch == 0:
            self._probe(state, logger)
        self._owed = 0.0

    def batch_end(self, state: State, logger: Logger) -> None:
        """Take off the clock what the last probe took, then probe if it is time."""
        self._settle(state)
        self._probe_if_due(state, logger, Event.BATCH_END)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Probe if it is time."""
        self._probe_if_due(state, logger, Event.EPOCH_END)

    def _probe_if_due(self, state: State, logger: Logger, event: Event) -> None:
        if self._due(state, event) and self._probed_at != state.timestamp.batch:
            self._probe(state, logger)

    def _probe(self, state: State, logger: Logger) -> None:
        """Probe on the first process; all agree on what that took, or their clocks would differ."""
        self._probed_at = int(state.timestamp.batch)
        if state.device.name == "gpu":
            torch.cuda.synchronize()  # what training has begun is not the probe's

        def probe() -> float:
            start = time.perf_counter()
            scores = self.scores(state)
            logger.log_metrics({f"metrics/probe/{name}": value for name, value in scores.items()})
            return time.perf_counter() - start

        self._owed += on_first_rank(probe)

    def _settle(self, state: State) -> None:
        """The batch that has ended holds the seconds of a probe before it: they are not of training."""
        now = state.timestamp
        owed, self._owed = min(timedelta(seconds=self._owed), now.batch_wct), 0.0
        state.timestamp = now.copy(
            total_wct=now.total_wct - owed,
            iteration_wct=now.iteration_wct - owed,
            epoch_wct=now.epoch_wct - owed,
            batch_wct=now.batch_wct - owed,
        )

    def scores(self, state: State) -> dict[str, float]:
        """Score the encoder as it is, and leave no trace in the model or the generators.

        Args:
            state: Of a run that has started.

        Returns:
            Top-1 in percent, ``{"knn": …, "linear": …}``.

        Raises:
            ValueError: If the features are not finite.
        """
        with _without_trace(state):
            train, test = (self._features(state, self._split[name]) for name in ("train", "test"))
            return {
                "knn": knn_accuracy(*train, *test, k=self.k, temperature=self.temperature),
                "linear": linear_probe_accuracy(*train, *test, weight_decay=self.weight_decay),
            }

    def _features(self, state: State, split: Split) -> Split:
        """Features in the place of images."""
        batches = zip(*(part.split(self.batch_size) for part in split), strict=True)
        encoders = {"encoder": unwrapped(state.model).encoder}
        features, labels = extract_features(
            encoders, batches, normalize=self._normalize, device=_device(state)
        )
        return features["encoder"], labels

    def _check(self) -> None:
        """Refuse folders that cannot be probed."""
        self._labels()
        for name in ("train", "test"):
            EvaluationImages(getattr(self, name), image_size=self.image_size)

    def _prepare(self, state: State) -> None:
        """Decode the images, if that has not been done, and see that the encoder takes them."""
        if self._split:
            return
        self._load()
        images, labels = self._split["train"]
        with _without_trace(state):  # what does not fit fails now, not hours later
            self._features(state, (images[:1], labels[:1]))

    def _load(self) -> None:
        for name, count in self._limits.items():
            images = EvaluationImages(getattr(self, name), image_size=self.image_size)
            chosen = [images[position] for position in spread(len(images), count or len(images))]
            pixels, labels = zip(*chosen, strict=True)
            self._split[name] = torch.stack(pixels), torch.tensor(labels, dtype=torch.int64)
        _, known = self._split["train"]
        if len(known) < self.k:
            raise ValueError(f"OnlineProbe: k={self.k}; expected at most {len(known)}, the training images")
        if len(known.unique()) < 2:
            raise ValueError(
                f"OnlineProbe: {self.train} has images of one class only; expected at least two: drop the "
                "callback"
            )
        shown, targets = self._split["test"]
        self._split["test"] = shown, relabelled(targets, self._labels())

    def _labels(self) -> Tensor | None:
        """The label in training of each class of the test images."""
        return training_labels(str(self.train), str(self.test))


def spread(size: int, count: int) -> list[int]:
    """Positions of a subset that hardly depends on the order: one at random of each of ``count`` equal parts.

    Where classes follow one another each is there in its proportion, and where they alternate none is missed.

    Args:
        size: Number of all.
        count: How many to choose, at most.

    Returns:
        Ascending positions, the same each time.
    """
    parts = min(size, count)
    edges = np.arange(parts + 1) * size // parts
    shares = np.random.RandomState(0).random_sample(parts)  # its numbers stay the same in all versions
    chosen: list[int] = (edges[:-1] + shares * np.diff(edges)).astype(int).tolist()
    return chosen


@contextmanager
def _without_trace(state: State) -> Iterator[None]:
    """Leave the generators as they are found; in float32, even where the whole training is in autocast."""
    rng = RngState.capture()
    try:
        with torch.autocast(_device(state).type, enabled=False):
            yield
    finally:
        rng.restore()


def _device(state: State) -> torch.device:
    return next(state.model.parameters()).device


def _schedule(interval: str | int | Time) -> Callable[[State, Event], bool]:
    """When to probe: at events that come before the history is written and a checkpoint is saved."""
    try:
        if Time.from_input(interval, TimeUnit.EPOCH).value > 0:
            ends = {Event.BATCH_END, Event.EPOCH_END}
            return create_interval_scheduler(interval, checkpoint_events=False, final_events=ends)
    except (ValueError, TypeError, RuntimeError):
        pass
    raise ValueError(
        f"interval={interval!r} is out of range: expected a time above 0 such as '1ep' or '200ba'"
    )
