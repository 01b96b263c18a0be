"""Accuracy under attack: FGSM and PGD in pixel space (paper, Table 6 and Figure 3).

The attack sees pixels in [0, 1] and the model normalises them, so a budget is one number for all channels.
The objective is the cross-entropy of the true label; the ascent is that of pre-training, `attack.pgd_attack`.

FGSM (Goodfellow et al., arXiv 1412.6572) is one step of the length of the budget from the image itself. PGD
(Madry et al., arXiv 1706.06083) starts from uniform noise inside the ball; its last iterate counts. The paper
says "PGD with 20 attack steps" and gives no step size: the default is 2.5 · epsilon / steps, which can reach
the border of the ball from anywhere in it and is what Madry et al. recommend.

Cost: for each budget and image one forward and backward per step, and one forward.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from aemim_algorithm.attack import pgd_attack
from aemim_algorithm.evaluation.features import evaluating
from aemim_algorithm.evaluation.predict import Clock, image_batches, timed_batches
from aemim_algorithm.evaluation.scores import wilson_interval
from aemim_algorithm.randomness import uniform
from aemim_algorithm.validation import require_integer, require_number

if TYPE_CHECKING:
    from aemim_algorithm.classifier import Classifier
    from aemim_algorithm.evaluation.image_sets import ImageSet

__all__ = [
    "FGSM_EPSILONS",
    "PGD_EPSILONS",
    "Attack",
    "RobustAccuracy",
    "attack_pixels",
    "fgsm",
    "pgd",
    "robust_accuracy",
    "starting_noise",
]

FGSM_EPSILONS = (0.0, 1.0, 2.0, 4.0, 8.0)
"""Budgets of Table 6, in 1/255 of the pixel range."""

PGD_EPSILONS = (0.0, 0.1275, 0.255, 0.3825, 0.51, 0.765, 1.02, 2.04)
"""Budgets in 1/255: 0, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004 and 0.008 of the pixel range."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack at one budget; :func:`fgsm` and :func:`pgd` make them.

    Attributes:
        name: ``"fgsm"`` or ``"pgd"``, for results.
        epsilon: L-infinity budget, in 1/255 of the pixel range; 0 is clean accuracy.
        steps: Number of gradient steps.
        step_size: Length of a step, in 1/255 of the pixel range.
        random_start: Whether it starts from uniform noise in the ball, or at the image.
    """

    name: str
    epsilon: float
    steps: int
    step_size: float
    random_start: bool

    def __post_init__(self) -> None:
        unit = " (1/255 of the pixel range)"
        require_number("epsilon", self.epsilon, low=0, high=255, unit=unit)
        require_integer("steps", self.steps, low=1)
        require_number("step_size", self.step_size, low=0, unit=unit)


def fgsm(epsilon: float) -> Attack:
    """The fast gradient sign method, without a random start.

    Args:
        epsilon: Budget and length of the one step, in 1/255 of the pixel range.

    Returns:
        The attack.

    Raises:
        ValueError: If ``epsilon`` is out of range.
    """
    return Attack(name="fgsm", epsilon=epsilon, steps=1, step_size=epsilon, random_start=False)


def pgd(
    epsilon: float, *, steps: int = 20, step_size: float | None = None, random_start: bool = True
) -> Attack:
    """Projected gradient descent.

    Args:
        epsilon: Budget, in 1/255 of the pixel range.
        steps: Number of gradient steps.
        step_size: Length of a step, in 1/255; ``None`` is ``2.5 * epsilon / steps``.
        random_start: Whether it starts from uniform noise in the ball.

    Returns:
        The attack.

    Raises:
        ValueError: If a number is out of range.
    """
    require_integer("steps", steps, low=1)
    length = 2.5 * epsilon / steps if step_size is None else step_size
    return Attack(name="pgd", epsilon=epsilon, steps=steps, step_size=length, random_start=random_start)


@dataclass(frozen=True)
class RobustAccuracy:
    """How many images are classified right, clean and under an attack.

    Attributes:
        attack: The attack.
        correct: Images that are right before and after it; one that is wrong without it counts as wrong.
        n: Images that were looked at.
        seed: Of the starting noise.
    """

    attack: Attack
    correct: int
    n: int
    seed: int

    @property
    def value(self) -> float:
        """Accuracy, in percent."""
        return 100.0 * self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval, in percent."""
        return wilson_interval(self.correct, self.n)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ``value``, ``n``, ``low``, ``high`` in percent, the attack's settings and the seed."""
        low, high = self.interval
        settings = asdict(self.attack)
        name = settings.pop("name")
        return {
            "attack": name,
            "value": self.value,
            "n": self.n,
            "low": low,
            "high": high,
            "seed": self.seed,
            **settings,
        }


def robust_accuracy(
    classifier: Classifier,
    image_set: ImageSet,
    attacks: Sequence[Attack],
    *,
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | str = "cpu",
    seed: int = 17,
    clock: Clock | None = None,
    progress: bool = False,
) -> list[RobustAccuracy]:
    """Accuracy of a classifier under each of several attacks; the images are read once.

    The same sample starts from the same noise, in units of the budget, at every budget, whatever the batch.

    Args:
        classifier: Its model is moved to ``device``, and is in eval mode within.
        image_set: Items (image uint8 (3, image_size, image_size), label, index).
        attacks: What :func:`fgsm` and :func:`pgd` return.
        batch_size: Images of one forward.
        workers: Processes that decode; 0: this one.
        device: Where the model runs.
        seed: Decides the starting noise, with each sample's index.
        clock: Is told the images, the time, and how much of it was spent waiting for data.
        progress: Show a bar on stderr.

    Returns:
        One result for each attack, in their order.

    Raises:
        ValueError: If there is no image or no attack, or a label is none of the model's classes.
    """
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed={seed}: expected an integer in [0, 2**31)")
    if not attacks or not len(image_set):
        raise ValueError(
            f"got {len(attacks)} attacks and {len(image_set)} images; expected one of each at least"
        )
    batches = image_batches(image_set, batch_size=batch_size, workers=workers)
    clock, start = clock or Clock(), time.perf_counter()
    correct, seen = [0] * len(attacks), 0
    with evaluating(classifier.model.to(device)):
        bar = tqdm(
            timed_batches(batches, clock),
            "attacks",
            len(batches),
            unit="batch",
            file=sys.stderr,
            disable=not progress,
        )
        for images, labels, indices in bar:
            pixels, labels = images.to(device).float() / 255, labels.to(device)
            right = _right(classifier, pixels, labels)
            pixels, labels, indices = pixels[right], labels[right], indices.to(device)[right]
            for number, attack in enumerate(attacks):
                correct[number] += _survivors(classifier, pixels, labels, indices, attack, seed)
            seen += len(images)
    clock.images, clock.seconds = clock.images + seen, clock.seconds + time.perf_counter() - start
    return [RobustAccuracy(attack, hits, seen, seed) for attack, hits in zip(attacks, correct, strict=True)]


def attack_pixels(
    classifier: Classifier, pixels: Tensor, labels: Tensor, attack: Attack, *, noise: Tensor | None = None
) -> Tensor:
    """Attack images with the cross-entropy of their labels.

    Args:
        classifier: Its model is used in the mode that it is in, and gets no gradients.
        pixels: Images in [0, 1], shape (batch, 3, height, width), float32 or float64.
        labels: True classes, shape (batch,), int64.
        attack: What to do.
        noise: Start in [-1, 1], shaped as ``pixels``, in units of the budget; only with
            ``attack.random_start``, where it is drawn from the global generator if ``None``.

    Returns:
        Adversarial images in [0, 1], no farther than the budget from ``pixels`` up to rounding, detached.

    Raises:
        ValueError: If the labels are not of the model's classes.
    """
    if not attack.random_start:
        noise = torch.zeros_like(pixels)
    objective = _cross_entropy(classifier, labels)
    return pgd_attack(
        objective,
        pixels,
        epsilon=attack.epsilon,
        steps=attack.steps,
        step_size=attack.step_size,
        mean=(0.0,) * pixels.shape[1],  # not normalised: the model normalises
        std=(1.0,) * pixels.shape[1],
        noise=noise,
    )


def starting_noise(shape: torch.Size, indices: Tensor, *, seed: int) -> Tensor:
    """Uniform noise that belongs to each sample.

    Args:
        shape: Of the images, samples first.
        indices: Number of each sample in its set, shape (samples,), int64, in [0, 2**32).
        seed: The same for all samples, in [0, 2**31).

    Returns:
        Noise in [-1, 1), shape ``shape``, float32, on the device of ``indices``.
    """
    return (uniform(indices + seed * 2**32, shape[1:].numel()) * 2 - 1).view(shape)


def _survivors(
    classifier: Classifier, pixels: Tensor, labels: Tensor, indices: Tensor, attack: Attack, seed: int
) -> int:
    """How many of these images, which are right, stay right."""
    if attack.epsilon == 0 or not len(pixels):
        return len(pixels)
    noise = starting_noise(pixels.shape, indices, seed=seed) if attack.random_start else None
    adversarial = attack_pixels(classifier, pixels, labels, attack, noise=noise)
    return int(_right(classifier, adversarial, labels).sum())


def _right(classifier: Classifier, pixels: Tensor, labels: Tensor) -> Tensor:
    """Which images are classified right, shape (batch,), bool."""
    with torch.no_grad():
        logits = _logits(classifier, pixels)
    if not len(labels):
        return labels == labels
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"{classifier.name}: its logits are not finite; has the training diverged?")
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"got labels from {int(labels.min())} to {int(labels.max())}; expected those of the "
            f"{logits.shape[1]} classes of {classifier.name}"
        )
    return logits.argmax(dim=1) == labels


def _cross_entropy(classifier: Classifier, labels: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda pixels: F.cross_entropy(_logits(classifier, pixels), labels, reduction="sum")


def _logits(classifier: Classifier, pixels: Tensor) -> Tensor:
    mean, std = (pixels.new_tensor(values).view(1, -1, 1, 1) for values in (classifier.mean, classifier.std))
    return classifier.model((pixels - mean) / std)
