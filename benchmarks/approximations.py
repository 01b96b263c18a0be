"""What `attack_strength.py` compares: attacks that cost less, or reach more.

Each is the package's `pgd_attack` with other objectives or another step size. ε is the budget, μ the length
of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from targets import Target, recorded, truncated
from torch import Tensor

from aemim_algorithm.adapters import adversarial_mode
from aemim_algorithm.attack import at_least_float32, pgd_attack, unit_gradient
from aemim_algorithm.losses import l2_distance

__all__ = ["Attack", "Candidate", "candidates"]

PARTS = (
    (Fraction(1, 3), 2, 0.625),
    (Fraction(1, 3), 2, 1.25),
    (Fraction(1, 6), 2, 2),
    (Fraction(1, 4), 2, 2),
    (Fraction(1, 3), 2, 2),
    (Fraction(1, 2), 2, 2),
    (Fraction(2, 3), 1, 2),
    (Fraction(1, 6), 3, 2),
    (Fraction(1, 6), 4, 2),
)
"""Which part of the blocks, how many steps, how long in ε."""

Objective = Callable[[Tensor], Tensor]


Attack = Callable[[Target], Tensor]
"""From a target to adversarial images, with the adversarial adapters in use."""


@dataclass(frozen=True)
class Candidate:
    """One attack.

    Attributes:
        source: Who had the idea.
        attack: Makes the adversarial images.
    """

    source: str
    attack: Attack


def candidates(depth: int) -> dict[str, Candidate]:
    """The attacks by name.

    Args:
        depth: Blocks of the encoder. Of the attacks on a part of them there are those whose part is a whole
            number of blocks.
    """
    found = {
        "noise alone": Candidate("", lambda target: _attack(target, [], step=1)),
        "T=1, μ=1.25ε": Candidate("Wong 2020", exact(1, 1.25)),
        "T=1, μ=2ε": Candidate("Wong 2020", exact(1, 2)),
        "T=2, μ=0.625ε": Candidate("AEMIM", exact(2, 0.625)),
        "T=2, μ=1.25ε": Candidate("Madry 2018", exact(2, 1.25)),
        "T=2, μ=2ε": Candidate("Madry 2018", exact(2, 2)),
        "T=3, μ=0.417ε": Candidate("AEMIM", exact(3, 1.25 / 3)),
        "T=3, μ=2ε": Candidate("Madry 2018", exact(3, 2)),
        "T=2, μ=0.625ε, bf16": Candidate("", bfloat16(exact(2, 0.625))),
        "T=2, μ=2ε, bf16": Candidate("", bfloat16(exact(2, 2))),
        "every other patch, then the rest, μ=2ε": Candidate("", halves),
        "clean graph, random direction": Candidate("ODI: Tashiro 2020", clean_graph(random_direction)),
        "clean graph, towards the mean": Candidate("Ganeshan 2019", clean_graph(towards_the_mean)),
        "gradient of the clean loss": Candidate("Goodfellow 2015", free_gradient),
    }
    for part, steps, size in PARTS:
        blocks = depth * part
        if blocks.denominator == 1:
            name = f"first {part} of the blocks, T={steps}, μ={size}ε"
            attack = truncated_steps(int(blocks), steps, size)
            found[name] = Candidate("Huang 2019; Ganeshan 2019", attack)
    if depth % 3 == 0:
        found["exact, then first 1/3 of the blocks, μ=2ε"] = Candidate("YOPO: Zhang 2019", yopo(depth // 3))
    return found


def exact(steps: int, size: float) -> Attack:
    """T steps on the distance of the features.

    Args:
        steps: T.
        size: μ in units of ε.
    """
    return lambda target: _attack(target, [feature_distance(target)] * steps, step=size)


def bfloat16(attack: Attack) -> Attack:
    """An attack whose passes run under bfloat16 autocast; the clean features stay those of the run."""

    def run(target: Target) -> Tensor:
        device = "cuda" if target.images.is_cuda else "cpu"  # there is none for meta
        with torch.autocast(device, dtype=torch.bfloat16):
            return attack(target)

    return run


def truncated_steps(depth: int, steps: int, size: float) -> Attack:
    """T steps whose passes end after a number of blocks, on the distance of what these return."""
    return lambda target: _attack(target, [block_distance(target, depth)] * steps, step=size)


def halves(target: Target) -> Tensor:
    """Two steps, each on every other visible patch and the features of these; half as many tokens a pass."""
    objectives = []
    for first in (0, 1):
        tokens = torch.arange(1 + first, target.output.shape[1], 2, device=target.images.device)
        visible, reference = target.visible[:, tokens - 1], target.features[:, tokens]

        def objective(images: Tensor, visible: Tensor = visible, reference: Tensor = reference) -> Tensor:
            features = target.model.encoder(images, visible)[:, 1:]
            return l2_distance(unit_gradient(features), reference).sum()

        objectives.append(objective)
    return _attack(target, objectives, step=2)


def yopo(depth: int) -> Attack:
    """An exact step of 2ε; then one through the lower blocks, along the first one's gradient at their end."""

    def run(target: Target) -> Tensor:
        encoder = target.model.encoder
        cotangents: list[Tensor] = []

        def first(images: Tensor) -> Tensor:
            with recorded(encoder) as layers:
                distance = feature_distance(target)(images)
            cotangents.extend(torch.autograd.grad(distance, layers[depth], retain_graph=True))
            # The rest of the way down: what was done is not done again.
            return (layers[depth] * cotangents[0]).sum()

        def second(images: Tensor) -> Tensor:
            return (truncated(encoder, images, target.visible, depth) * cotangents[0]).sum()

        return _attack(target, [first, second], step=2)

    return run


def clean_graph(direction: Callable[[Target], Tensor]) -> Attack:
    """A step of 2ε along a direction in feature space, by one backward through the graph that is there."""

    def run(target: Target) -> Tensor:
        cotangent = direction(target)
        (gradient,) = torch.autograd.grad(target.output, target.leaf, cotangent, retain_graph=True)
        return _attack(target, [lambda images: (images * gradient).sum()], step=2)

    return run


def random_direction(target: Target) -> Tensor:
    """Normally distributed, for each token its own."""
    return torch.randn_like(target.features)


def towards_the_mean(target: Target) -> Tensor:
    """From each token's features to the mean of all."""
    return target.features.mean(dim=(0, 1)) - target.features


def free_gradient(target: Target) -> Tensor:
    """A step of 2ε along the gradient of the clean loss."""
    return _attack(target, [lambda images: (images * target.loss_gradient).sum()], step=2)


def feature_distance(target: Target) -> Objective:
    """The paper's objective, Eq. 7."""

    def objective(images: Tensor) -> Tensor:
        features = unit_gradient(target.model.encoder(images, target.visible))
        return l2_distance(features, target.features).sum()

    return objective


def block_distance(target: Target, depth: int) -> Objective:
    """The same distance between what a number of blocks have made of the images."""

    def objective(images: Tensor) -> Tensor:
        features = unit_gradient(truncated(target.model.encoder, images, target.visible, depth))
        return l2_distance(features, target.layers[depth]).sum()

    return objective


def _attack(target: Target, objectives: Sequence[Objective], *, step: float) -> Tensor:
    """The package's attack with one objective a step; with none it is noise alone."""
    remaining = iter(objectives)
    with adversarial_mode(target.model):
        return pgd_attack(
            (lambda images: next(remaining)(images)) if objectives else _flat,
            at_least_float32(target.images),
            epsilon=target.epsilon,
            steps=max(1, len(objectives)),
            step_size=step * target.epsilon,
            noise=target.noise,
        )


def _flat(images: Tensor) -> Tensor:
    """An objective without a slope: the images stay as they are."""
    return (images * 0).sum()
