"""Which samples of a batch are attacked, with which noise and weight, over its micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from composer.utils import dist
from torch import Tensor

from aemim_algorithm.randomness import choose_samples, uniform_noise

__all__ = ["BatchPlan", "Share", "noise_of"]

Noise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Share:
    """The part of a micro-batch that is attacked.

    Attributes:
        index: The samples, shape (samples,), int64; ``None`` for all of them.
        noise: Makes their starting noise.
        weight: Weight of their mean loss: chosen over *expected* samples of the micro-batch. A plain
            mean would weight samples unequally, and micro-batches and ranks would not add up to the batch.
    """

    index: Tensor | None
    noise: Noise
    weight: float


@dataclass
class BatchPlan:
    """The choice for one rank's batch, and how far its micro-batches have come.

    Args:
        size: Samples of this rank's batch.
        ratio: Share α to attack, in (0, 1].
        seed: Seed of the run, the same on every rank.
        number: Number of the batch in the run.
    """

    size: int
    ratio: float
    seed: int
    number: int
    _seen: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._global_size = dist.get_world_size() * self.size
        self._first = dist.get_global_rank() * self.size
        # Of the global batch, so that the choice does not depend on the number of ranks.
        chosen = choose_samples(self._global_size, self.ratio, seed=self.seed, batch=self.number)
        self._share = len(chosen) / self._global_size
        self._chosen = chosen[(chosen >= self._first) & (chosen < self._first + self.size)] - self._first

    def rewind(self) -> None:
        """Start again with the first micro-batch."""
        self._seen = 0

    def take(self, size: int) -> Share | None:
        """The share of the next micro-batch, or ``None`` if nothing of it was chosen.

        With several ranks there is always one, of weight 0 if need be: ranks must run the same passes.

        Args:
            size: Samples of the micro-batch.

        Raises:
            ValueError: If the micro-batches hold more samples than the batch.
        """
        start = self._seen
        self._seen += size
        if self._seen > self.size:
            raise ValueError(
                f"the encoder has seen {self._seen} images of a batch of {self.size}: AEMIM takes the "
                "batch size from the first tensor of the batch that can be images; put the images first"
            )
        index = self._chosen[(self._chosen >= start) & (self._chosen < start + size)] - start
        weight = len(index) / (self._share * size)
        if len(index) == 0 and dist.get_world_size() > 1:
            index = torch.zeros(1, dtype=torch.int64)
        if len(index) == 0:
            return None
        positions = index + self._first + start
        noise = noise_of(seed=self.seed, number=self.number, positions=positions)
        return Share(None if len(index) == size else index, noise, weight)


def noise_of(*, seed: int, number: int, positions: Tensor) -> Noise:
    """A function that makes the starting noise of images at these positions of the global batch."""
    return partial(_noise, seed=seed, number=number, positions=positions)


def _noise(images: Tensor, *, seed: int, number: int, positions: Tensor) -> Tensor:
    positions = positions.to(images.device)
    return uniform_noise(images.shape, seed=seed, batch=number, positions=positions)
