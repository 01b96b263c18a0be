"""What is measured over the micro-batches and ranks of one training batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from composer.utils import dist
from torch import Tensor

from aemim_algorithm.attack import outside_pixel_range
from aemim_algorithm.branch import AdversarialPass

__all__ = ["AttackMetrics", "PixelRangeCheck"]


class AttackMetrics:
    """Sums over samples, kept on the device until the end of a batch: no step waits for a GPU."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._largest: Tensor | None = None
        self._first_is_known = False

    def update(self, result: AdversarialPass, *, counted: bool = True) -> None:
        """Add the samples of one adversarial pass; none of a pass that only keeps step with other ranks."""
        # Of the steps: without the noise, if there were steps. An empty tensor if nothing was measured.
        steps = result.distances[1:] or result.distances or (result.perturbation[:0],)
        first, last = steps[0], steps[-1]
        self._first_is_known = len(result.distances) > 1
        sums = torch.stack([first.sum(), last.sum(), first.new_tensor(float(len(first)))])
        largest = result.perturbation.amax()
        if not counted:
            sums, largest = torch.zeros_like(sums), torch.zeros_like(largest)
        self._sums = sums if self._sums is None else self._sums + sums
        self._largest = largest if self._largest is None else self._largest.maximum(largest)

    def compute(self) -> dict[str, float]:
        """Reduce over ranks; the names are those that are logged."""
        if self._sums is None or self._largest is None:
            return {}
        dist.all_reduce(self._sums, reduce_operation="SUM")
        dist.all_reduce(self._largest, reduce_operation="MAX")
        first, last, count = self._sums.tolist()
        metrics = {"aemim/perturbation_linf": self._largest.item()}
        if count:
            metrics["aemim/feature_distance/last_step"] = last / count
        if self._first_is_known:
            metrics["aemim/feature_distance/first_step"] = first / count
        return metrics


class PixelRangeCheck:
    """Warns once if images were normalised by other values than the attack believes.

    Args:
        mean: Mean that the attack believes in.
        std: Standard deviation likewise.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = mean, std
        self._excess: Tensor | None = None
        self._warned = False

    def update(self, images: Tensor) -> None:
        """Look at the clean images of a micro-batch."""
        if not self._warned:
            excess = outside_pixel_range(images, self.mean, self.std)
            self._excess = excess if self._excess is None else self._excess.maximum(excess)

    def warn_once(self) -> None:
        """Warn; waits for the device, so once a batch, and no more after the warning."""
        if self._excess is None:
            return
        excess, self._excess = self._excess.item(), None
        if excess > 0.01:
            self._warned = True
            warnings.warn(
                f"AEMIM: the images leave the pixel range [0, 1] by {excess:.2f} after undoing "
                f"mean={self.mean} and std={self.std}: pass AEMIM(mean=..., std=...) the values that "
                "the images were normalised with, or epsilon will not be 1/255 of the pixel range",
                stacklevel=2,
            )
