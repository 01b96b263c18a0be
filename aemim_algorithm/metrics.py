"""What is measured over the micro-batches and ranks of one training batch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from composer.utils import dist
from torch import Tensor

from aemim_algorithm.attack import outside_pixel_range
from aemim_algorithm.branch import AdversarialPass
from aemim_algorithm.losses import total_loss

__all__ = ["AttackMetrics", "FiniteLossCheck", "PixelRangeCheck"]


class AttackMetrics:
    """Sums over samples, kept on the device until the end of a batch: no step waits for a GPU."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._largest: Tensor | None = None

    def update(self, result: AdversarialPass, *, counted: bool = True) -> None:
        """Add the samples of one adversarial pass; none of a pass that only keeps step with other ranks."""
        _, first, *later = result.distances
        last = later[-1] if later else first
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
        return {
            "aemim/feature_distance/first_step": first / count,
            "aemim/feature_distance/last_step": last / count,
            "aemim/perturbation_linf": self._largest.item(),
        }


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


class FiniteLossCheck:
    """Finds the branch in which a loss became NaN or infinite, before the optimizer steps on it."""

    def __init__(self) -> None:
        self._finite: dict[str, Tensor] = {}

    def update(self, loss: Any) -> None:
        """Look at the loss of a micro-batch: a tensor, a sequence, or a dict with named parts."""
        parts = dict(loss) if isinstance(loss, Mapping) else {"training": total_loss(loss)}
        for name, value in parts.items():
            finite = value.detach().isfinite().all()
            self._finite[name] = finite & self._finite.get(name, finite)

    def require_finite(self, batch: int) -> None:
        """Raise on every rank alike if any rank's loss was not finite; then start afresh.

        Args:
            batch: Number of the batch, for the message.

        Raises:
            FloatingPointError: If a loss was NaN or infinite; names the batch and the branch.
        """
        if not self._finite:
            return
        names, flags = list(self._finite), torch.stack(list(self._finite.values())).int()
        self._finite = {}
        dist.all_reduce(flags, reduce_operation="MIN")
        broken = [n for n, flag in zip(names, flags.tolist(), strict=True) if not flag and n != "total"]
        if not all(flags.tolist()):
            raise FloatingPointError(
                f"batch {batch}: the {' and the '.join(broken or ['total'])} loss is NaN or infinite; "
                "the optimizer was not stepped. Resume from the last checkpoint with a lower learning "
                "rate, gradient clipping, or precision amp_bf16 instead of amp_fp16"
            )
