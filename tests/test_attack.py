"""Properties of the attack: the ball, the pixel range, ascent, and what must stay untouched."""

from __future__ import annotations

import pytest
import torch
from conftest import normalised_images
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from aemim_algorithm import pgd_attack
from aemim_algorithm.attack import linf_distance, outside_pixel_range

MEAN = torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]
STD = torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))


def distance_to_clean(model: nn.Module, images: Tensor) -> object:
    reference = model(images).detach()
    return lambda x: (model(x) - reference).square().sum()


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_stays_in_the_ball_and_the_pixel_range(images: Tensor, epsilon: float, steps: int) -> None:
    objective = distance_to_clean(network(), images)
    adversarial = pgd_attack(objective, images, epsilon=epsilon, steps=steps)  # type: ignore[arg-type]
    # In pixels, by arithmetic of our own, one bound for every channel.
    difference = ((adversarial - images) * STD * 255).abs().amax(dim=(0, 2, 3))
    assert (difference <= epsilon + 1e-4).all()
    assert (difference > 0.9 * epsilon).all()  # the budget is used in every channel
    pixels = adversarial * STD + MEAN
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert torch.allclose(linf_distance(adversarial, images, IMAGENET_DEFAULT_STD).max(), difference.max())


def test_distance_rises_above_noise_and_with_each_step(images: Tensor) -> None:
    model = network()
    objective = distance_to_clean(model, images)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    reached = [objective(images + noise * 2 / 255 / STD)]  # type: ignore[operator]
    for steps in (1, 2, 4):
        adversarial = pgd_attack(objective, images, epsilon=2, steps=steps, step_size=1, noise=noise)  # type: ignore[arg-type]
        reached.append(objective(adversarial))  # type: ignore[operator]
    assert reached == sorted(reached)
    assert reached[1] > 1.5 * reached[0]


def test_one_step_is_the_signed_gradient_of_each_sample(images: Tensor) -> None:
    """A linear objective has a known maximiser: x + ε·sign(w), cut to the pixel range."""
    weight = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    adversarial = pgd_attack(lambda x: (x * weight).sum(), images, epsilon=2, steps=1, step_size=4)
    pixels = (images * STD + MEAN) + 2 / 255 * weight.sign()
    assert torch.allclose(adversarial * STD + MEAN, pixels.clamp(0, 1), atol=1e-6)


def test_default_step_size_is_five_quarters_of_the_budget_over_the_steps(images: Tensor) -> None:
    zero = torch.zeros_like(images)
    moved = pgd_attack(lambda x: x.sum(), images * 0, epsilon=2, steps=4, noise=zero)
    one = pgd_attack(lambda x: x.sum(), images * 0, epsilon=2, steps=1, step_size=0.625, noise=zero)
    assert torch.allclose(linf_distance(one, images * 0, IMAGENET_DEFAULT_STD), torch.tensor(0.625))
    assert torch.allclose(linf_distance(moved, images * 0, IMAGENET_DEFAULT_STD), torch.tensor(2.0))


def test_touches_neither_parameters_nor_gradients_nor_the_input(images: Tensor) -> None:
    model, before = network(), images.clone()
    parameters = [p.detach().clone() for p in model.parameters()]
    adversarial = pgd_attack(distance_to_clean(model, images), images, epsilon=2, steps=2)  # type: ignore[arg-type]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(images, before)
    assert not adversarial.requires_grad


def test_generator_decides_the_noise_and_the_global_one_is_left_alone(images: Tensor) -> None:
    state = torch.get_rng_state()
    first, second, other = (
        pgd_attack(
            lambda x: 0 * x.sum(), images, epsilon=2, steps=1, generator=torch.Generator().manual_seed(s)
        )
        for s in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_zero_budget_returns_the_images(images: Tensor) -> None:
    objective = distance_to_clean(network(), images)  # zero distance: a norm would give NaN here
    assert torch.equal(pgd_attack(objective, images, epsilon=0, steps=2), images)  # type: ignore[arg-type]


def test_half_precision_images_keep_the_ball(images: Tensor) -> None:
    half = images.bfloat16()
    adversarial = pgd_attack(lambda x: x.float().sum(), half, epsilon=2, steps=2)
    assert adversarial.dtype == torch.bfloat16
    rounding = half.abs().max().item() * 2**-8 * STD.max().item() * 255
    assert linf_distance(adversarial, half, IMAGENET_DEFAULT_STD).max() <= 2 + rounding


def test_an_image_outside_the_pixel_range_is_not_pulled_out_of_its_ball() -> None:
    images = normalised_images(2) * 3
    adversarial = pgd_attack(lambda x: x.sum(), images, epsilon=2, steps=2)
    assert linf_distance(adversarial, images, IMAGENET_DEFAULT_STD).max() <= 2 + 1e-4
    assert outside_pixel_range(images, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) > 0.5
    assert outside_pixel_range(images / 3, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) < 1e-5


def test_videos_have_their_channels_third(images: Tensor) -> None:
    video = images.view(2, 4, 3, 16, 16)
    noise = torch.ones_like(video)
    flat = pgd_attack(lambda x: x.sum(), images, epsilon=2, steps=1, noise=torch.ones_like(images))
    assert torch.equal(
        pgd_attack(lambda x: x.sum(), video, epsilon=2, steps=1, noise=noise).view(8, 3, 16, 16), flat
    )


@pytest.mark.parametrize(
    ("argument", "value"),
    [("epsilon", -1), ("epsilon", 256), ("epsilon", float("nan")), ("steps", -1), ("steps", 1.5),
     ("step_size", -0.1), ("mean", (0.5,)), ("std", (0.5, 0.0, 0.5)), ("mean", "abc")],
)  # fmt: skip
def test_bad_arguments_are_named(images: Tensor, argument: str, value: object) -> None:
    arguments: dict[str, object] = {"epsilon": 2.0, "steps": 1} | {argument: value}
    with pytest.raises(ValueError, match=argument):
        pgd_attack(lambda x: x.sum(), images, **arguments)  # type: ignore[arg-type]
