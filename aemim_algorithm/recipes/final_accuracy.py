"""The accuracy that a fine-tuning run ends with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from composer import Trainer
from composer.core import Precision, State
from composer.utils import dist

from aemim_algorithm.evaluation.scores import wilson_interval
from aemim_algorithm.recipes.preflight import precision_of
from aemim_algorithm.recipes.schema import FineTuneRecipe

__all__ = ["Accuracy", "final_accuracy"]


@dataclass(frozen=True)
class Accuracy:
    """Top-1 on the test images; ``top5`` in percent, ``None`` where there are five classes or fewer.

    ``precision`` is that of the forward passes: float32, as ``aemim evaluate`` scores, except under FSDP,
    whose units compute in the run's.
    """

    correct: int
    n: int
    top5: float | None
    precision: str = "fp32"

    @property
    def percent(self) -> float:
        """Top-1 in percent."""
        return 100 * self.correct / self.n

    def __str__(self) -> str:
        low, high = wilson_interval(self.correct, self.n)
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.2f}%"
        return (
            f"top-1 {self.percent:.2f}% (95% interval {low:.2f} to {high:.2f}: {self.correct:,} of "
            f"{self.n:,} images){top5}; {self.precision}"
        )


def final_accuracy(trainer: Trainer, recipe: FineTuneRecipe, n: int) -> Accuracy:
    """Score the model on all test images; every rank must call this.

    Args:
        trainer: Of the recipe, with the evaluator ``eval``.
        recipe: A loaded recipe.
        n: Number of test images.

    Returns:
        The accuracy, on every rank.
    """
    with _in_float32(trainer.state):
        trainer.eval()  # under EMA the averaged weights stay in the model, and are those that are saved
    sharded = recipe.parallelism and dist.get_world_size() > 1
    found = {name: float(metric.compute()) for name, metric in trainer.state.eval_metrics["eval"].items()}
    top5 = found.get("top5")
    # A count divided by n in float32; rounding gives the count back for n below 2**23.
    return Accuracy(
        round(found["top1"] * n),
        n,
        None if top5 is None else 100 * top5,
        precision=precision_of(recipe) if sharded else "fp32",
    )


@contextmanager
def _in_float32(state: State) -> Iterator[None]:
    """Forward passes as those of `aemim evaluate`: neither bfloat16 nor, as Composer allows, TF32."""
    precision, tf32 = state.precision, torch.backends.cuda.matmul.allow_tf32
    state.precision, torch.backends.cuda.matmul.allow_tf32 = Precision.FP32, False
    try:
        yield
    finally:
        state.precision, torch.backends.cuda.matmul.allow_tf32 = precision, tf32
