"""The attack in half precision: a small distance must not underflow to a zero perturbation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import normalised_images, perturb, tiny_mae
from settings import Setting, every_setting, without_randomness
from torch import Tensor, nn

from aemim_algorithm import AEMIM
from aemim_algorithm.attack import unit_gradient
from aemim_algorithm.models import MAE

DTYPES = [torch.bfloat16, torch.float16]


def attacked(model: MAE, aemim: AEMIM, dtype: torch.dtype | None) -> tuple[Tensor, Any]:
    """Adversarial minus clean images, after the last step, without the noise that they began with."""
    aemim.attach(model)
    model.train()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        _, result = aemim.attack(model, normalised_images(8), step=0)
    return result.images - result.clean_images, result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
@pytest.mark.parametrize("adversarial_loss", ["l2", "kl", "reconstruction"])
def test_half_precision_attacks_as_float32_does(
    dtype: torch.dtype, scale: float, adversarial_loss: str
) -> None:
    """Features as small as 1e-4 have distances of 1e-11: their gradient is zero in float16 by itself."""

    def build() -> MAE:
        model = tiny_mae()
        if adversarial_loss != "reconstruction":  # whose scale is that of the pixels
            with torch.no_grad():
                model.encoder.norm.weight.mul_(scale)
        return model

    # One step from one side of the ball to the other: its sign is all that counts.
    options = {"adversarial_loss": adversarial_loss, "steps": 1, "step_size": 4.0}
    exact, _ = attacked(build(), AEMIM(**options), None)
    half, result = attacked(build(), AEMIM(**options), dtype)
    mask = result.outputs["mask"]
    visible = ~mask.view(8, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(half)
    agreement = (half[visible].sign() == exact[visible].sign()).float().mean()
    # Of KL in bfloat16 this seed has 0.895; over 24 seeds both ways of attention have 0.901 on average.
    bfloat16 = 0.85 if adversarial_loss == "kl" else 0.9
    assert agreement > (0.97 if dtype == torch.float16 else bfloat16)
    assert (half[visible] != 0).all()
    if adversarial_loss == "l2":
        noise, after = result.distances
        assert (after > 2 * noise).all()


def test_without_it_float16_would_attack_with_noise_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    monkeypatch.setattr("aemim_algorithm.branch.unit_gradient", lambda features: features)
    model = tiny_mae()
    with torch.no_grad():
        model.encoder.norm.weight.mul_(1e-4)
    _, result = attacked(model, AEMIM(steps=1, step_size=4.0), torch.float16)
    noise, after = result.distances
    assert torch.equal(after, noise)


@pytest.mark.parametrize("factor", [1.0, 3e-30, 7e20, 0.0])
def test_unit_gradient_scales_by_a_power_of_two(factor: float) -> None:
    features = torch.randn(4, 5, requires_grad=True)
    weights = torch.randn(4, 5) * factor
    (gradient,) = torch.autograd.grad((unit_gradient(features) * weights).sum(), features)
    if factor == 0:
        assert not gradient.any()
        return
    assert 0.5 <= gradient.abs().max() < 1
    ratio = (gradient / weights).flatten()
    assert (ratio == ratio[0]).all()
    assert torch.frexp(ratio[0]).mantissa == 0.5
    assert torch.equal(unit_gradient(features), features)


def test_a_gradient_that_overflows_leaves_the_pixel_where_it_is() -> None:
    from aemim_algorithm import pgd_attack

    images = normalised_images(2)

    def objective(x: Tensor) -> Tensor:
        return (x * torch.where(torch.arange(16) % 2 == 0, torch.nan, 1.0)).sum()

    noise = torch.zeros_like(images)
    result = pgd_attack(objective, images, epsilon=2, steps=1, noise=noise)
    assert torch.equal(result[..., ::2], images[..., ::2])
    assert (result[1:, ..., 1::2] > images[1:, ..., 1::2]).float().mean() > 0.95
    assert result.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_float16_training_moves_every_adapter(dtype: torch.dtype) -> None:
    aemim, model = AEMIM(), tiny_mae()
    aemim.attach(model)
    model.train()
    with torch.autocast("cpu", dtype=dtype):
        losses = aemim.training_loss(model, normalised_images(8), step=0)
    assert losses["total"].dtype == torch.float32
    (losses["total"] * 2**10).backward()
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert all(parameter.grad.any() for norm in norms for parameter in norm.parameters(recurse=False))


@every_setting
def test_autocast_leaves_every_parameter_its_gradient(setting: Setting) -> None:
    """Autocast keeps weights that it has cast: a reference pass without gradient must not be their origin."""

    def trained(enabled: bool) -> set[str]:
        aemim = AEMIM(loss_ratio=0.0, adversarial_ratio=0.25, steps=1, **setting.arguments)
        model = without_randomness(setting.build())
        aemim.attach(model)
        perturb(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = aemim.training_loss(model, setting.batch(0), step=0)["total"]
        loss.backward()
        return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    assert trained(True) == trained(False)
