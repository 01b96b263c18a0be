"""Accuracies and how sure they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from aemim_algorithm.validation import require_integer, require_number

__all__ = ["Proportion", "top1", "topk", "wilson_interval"]


def wilson_interval(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927, doi 10.1080/01621459.1927.10502953).

    It covers what other samples of the same images would give; not other seeds of the training.

    Args:
        correct: Successes, 0 <= correct <= n.
        n: Trials, at least 1.
        level: Of confidence, in (0, 1).

    Returns:
        Low and high end, in percent, within [0, 100].

    Raises:
        ValueError: An argument is out of range.
    """
    require_integer("n", n, low=1)
    require_integer("correct", correct, low=0)
    require_number("level", level, low=0, high=1, low_open=True)
    if correct > n or level == 1:
        raise ValueError(f"correct={correct}, n={n}, level={level}: expected correct <= n and level < 1")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n the formula's end is 0 or 100 but for rounding.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == n else min(1.0, centre + half)
    return 100 * low, 100 * high


def top1(logits: Tensor, labels: Tensor, *, subset: Tensor | None = None) -> Tensor:
    """Which images are classified right.

    Args:
        logits: Shape (batch, classes), float.
        labels: Shape (batch,), integers; positions in all classes.
        subset: Shape (k,), the classes that can be answered; None: all. ImageNet-A and -R have 200 of
            ImageNet's classes, and their papers (arXiv 1907.07174, 2006.16241) take the maximum over these.

    Returns:
        Shape (batch,), bool.
    """
    return topk(logits, labels, k=1, subset=subset)


def topk(logits: Tensor, labels: Tensor, *, k: int, subset: Tensor | None = None) -> Tensor:
    """Which images have their label among the `k` highest logits; arguments as for `top1`.

    Returns:
        Shape (batch,), bool.
    """
    if subset is not None:
        best = subset[logits[:, subset].topk(min(k, len(subset)), dim=1).indices]
    else:
        best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(dim=1)


@dataclass
class Proportion:
    """Counts successes over batches.

    Attributes:
        correct: Successes so far.
        n: Trials so far.
    """

    correct: int = 0
    n: int = 0

    def add(self, successes: Tensor) -> None:
        """Count a batch of them, shape (batch,), bool."""
        self.correct += int(successes.sum(dtype=torch.int64))
        self.n += len(successes)

    def summary(self) -> dict[str, float | int]:
        """`value` in percent, `n`, `correct`, and the 95% Wilson interval `low` to `high`."""
        low, high = wilson_interval(self.correct, self.n)
        value = 100 * self.correct / self.n
        return {"value": value, "n": self.n, "correct": self.correct, "low": low, "high": high}
