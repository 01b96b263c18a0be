"""Randomness that depends on nothing but what is being trained.

AEMIM never draws from the global generators. Its noise and its choice of samples are a hash of (seed, batch,
position of the sample in the global batch), so they are the same for any number of ranks, any
micro-batch and after a resume, without saved state. And what the model draws itself can be replayed:
:class:`RngState` is a snapshot of every global generator that a forward pass may use.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["RngState", "choose_samples", "uniform", "uniform_noise"]

_NOISE, _CHOICE, _TURN, _SAMPLE = 1, 2, 3, 4  # streams that must not share a hash
_GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio as int64, the increment of SplitMix64


@dataclass(frozen=True)
class RngState:
    """Snapshot of Python's, NumPy's and torch's global generators (CPU, and the current GPU)."""

    python: Any
    numpy: Any
    torch_cpu: Tensor
    torch_cuda: Tensor | None

    @classmethod
    def capture(cls) -> RngState:
        """Take a snapshot; nothing is drawn and no GPU is waited for."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Put every generator back to where it was."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda is not None:
            torch.cuda.set_rng_state(self.torch_cuda)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RngState):
            return NotImplemented
        return (
            self.python == other.python
            and all(np.array_equal(a, b) for a, b in zip(self.numpy, other.numpy, strict=True))
            and torch.equal(self.torch_cpu, other.torch_cpu)
            and (self.torch_cuda is None) == (other.torch_cuda is None)
            and (self.torch_cuda is None or torch.equal(self.torch_cuda, other.torch_cuda))  # type: ignore[arg-type]
        )

    __hash__ = None  # type: ignore[assignment]


def uniform_noise(shape: torch.Size, *, seed: int, batch: int, positions: Tensor) -> Tensor:
    """Noise in [-1, 1) that belongs to each sample's position in the global batch.

    Args:
        shape: Shape of the noise, samples first.
        seed: The run's seed, the same on every rank.
        batch: Number of the batch in the run.
        positions: Position of each sample in the global batch, shape (samples,), int64, on the
            device where the noise is wanted.

    Returns:
        Noise of shape ``shape``, float32.
    """
    size = shape[1:].numel()
    words = -(-size // 4)  # one 64-bit word gives four 16-bit numbers: fine enough inside a ball
    counter = torch.arange(words, device=positions.device) * _GOLDEN
    bits = _mix(counter[None, :] + _hash(positions, _NOISE, seed, batch)[:, None])
    return (bits.view(torch.int16)[:, :size].float() / 2**15).view(shape)


def uniform(seeds: Tensor, count: int) -> Tensor:
    """Uniform numbers that belong to each sample's seed: where the sample lies in a batch changes nothing.

    Args:
        seeds: Seed of each sample, shape (samples,), int64, well mixed, on the device where the numbers are
            wanted.
        count: Numbers for each sample.

    Returns:
        Numbers in [0, 1), multiples of 2**-24, shape (samples, count), float32.
    """
    counter = torch.arange(1, count + 1, device=seeds.device) * _GOLDEN
    words = _mix(_hash(seeds, _SAMPLE)[:, None] + counter)
    return (words >> 40 & (1 << 24) - 1).float() / 2**24


def choose_samples(size: int, ratio: float, *, seed: int, batch: int) -> Tensor:
    """Choose a share of a global batch: one sample of every ``1 / ratio`` consecutive ones.

    Every sample is as likely. Where each rank's part divides into whole strata the ranks carry equal work.

    Args:
        size: Samples of the global batch.
        ratio: Share to choose, in (0, 1].
        seed: The run's seed, the same on every rank.
        batch: Number of the batch in the run.

    Returns:
        Sorted positions in the global batch, shape (max(1, round(ratio * size)),), int64, on the CPU.
    """
    count = max(1, round(ratio * size))
    edges = torch.arange(count + 1) * size // count
    start, length = edges[:-1], edges.diff()
    bits = _hash(start, _CHOICE, seed, batch)
    chosen = start + ((bits & 0xFFFFFFFF) * length >> 32)
    if size % count == 0:
        return chosen
    # Strata of unequal length: turn them at random, or samples of the long ones would be rarer.
    turn = _hash(torch.tensor(0), _TURN, seed, batch) & 0xFFFFFFFF
    return ((chosen + (turn * size >> 32)) % size).sort().values


def _hash(values: Tensor, *key: int) -> Tensor:
    """Hash int64 values under a key of integers."""
    for number in key:
        values = _mix(values * _GOLDEN + number)
    return values


def _mix(values: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection of 64-bit words.

    int64 wraps as unsigned words do, but shifts in the sign: hence the masks.
    """
    values = (values ^ values >> 30 & (1 << 34) - 1).mul_(-0x40A7B892E31B1A47)
    values = values.bitwise_xor_(values >> 27 & (1 << 37) - 1).mul_(-0x6B2FB644ECCEEE15)
    return values.bitwise_xor_(values >> 31 & (1 << 33) - 1)
