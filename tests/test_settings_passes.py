"""On every model of the table both passes share one mask, and the target of both is the clean image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from composer.models import ComposerModel
from conftest import recorded_passes
from settings import SETTINGS, Setting, every_setting, transformers_installed
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from aemim_algorithm import AEMIM
from aemim_algorithm.models import MAE
from aemim_algorithm.search import resolve_encoder


@every_setting
def test_without_budget_and_adapters_both_losses_are_equal(setting: Setting) -> None:
    """Everything random must repeat: masks, dropout, stochastic depth."""
    aemim, model = AEMIM(epsilon=0, adapter="none", steps=1, **setting.arguments), setting.build()
    aemim.attach(model)
    losses = aemim.training_loss(model, setting.batch(0), step=0)
    torch.testing.assert_close(losses["adversarial"], losses["clean"], rtol=1e-5, atol=0)


@pytest.mark.skipif(not transformers_installed, reason="transformers is not installed")
def test_most_models_draw_something_that_must_repeat() -> None:
    """Else the test above could not fail: two passes over one batch, without AEMIM."""
    drawing = 0
    for setting in SETTINGS:
        model, batch = setting.build(), setting.batch(0)
        first, second = (model.loss(model(batch), batch) for _ in range(2))
        drawing += not torch.allclose(first, second, rtol=1e-5, atol=0)
    assert drawing >= 10


@every_setting
def test_a_quarter_of_the_batch_has_the_mask_of_its_reference(setting: Setting) -> None:
    """The reference of a smaller batch, cut from the whole or run again, is under the same mask."""
    aemim = AEMIM(epsilon=0, adapter="none", adversarial_ratio=0.25, **setting.arguments)
    model = setting.build()
    aemim.attach(model)
    results = recorded_passes(aemim)
    aemim.training_loss(model, setting.batch(0), step=0)
    (result,) = results
    assert len(result.images) == 2
    for distance in result.distances:
        # A cut reference went through larger matrix products: their last bits may differ.
        assert distance.max() <= 1e-9, distance


def distance_by_hand(kind: str, features: Tensor, reference: Tensor, dim: int) -> np.ndarray:
    """Eq. 7 for each sample in float64: mean over tokens, sum over a token's features."""
    x, r = (np.moveaxis(t.detach().double().numpy(), dim, -1) for t in (features, reference))
    if kind == "l2":
        values = ((x - r) ** 2).sum(-1)
    else:
        x, r = (t - np.log(np.exp(t).sum(-1, keepdims=True)) for t in (x, r))
        values = (np.exp(r) * (r - x)).sum(-1)
    return values.reshape(len(values), -1).mean(axis=1)


@pytest.mark.parametrize("kind", ["l2", "kl"])
@every_setting
def test_distances_are_those_of_the_features_by_hand(setting: Setting, kind: str) -> None:
    """Of the tensor that the encoder returned, and along the dimension that holds a token's features."""
    aemim, model = AEMIM(adversarial_loss=kind, epsilon=8, **setting.arguments), setting.build()
    seen: list[Tensor] = []

    def record(output: Any) -> Any:
        seen.append(output if isinstance(output, Tensor) else output[0])
        return output

    pass_features_through(model, setting.encoder, record)
    aemim.attach(model)
    _, result = aemim.attack(model, setting.batch(0), step=0)
    clean, *adversarial = seen
    assert len(adversarial) == len(result.distances) == 3
    for features, distance in zip(adversarial, result.distances, strict=True):
        expected = distance_by_hand(kind, features, clean, setting.feature_dim)
        np.testing.assert_allclose(distance.numpy(), expected, rtol=2e-3)


class Frozen:
    """Makes every call of an encoder return what the first one did, whatever the image."""

    def __init__(self) -> None:
        self.first: Any = None
        self.calls = 0

    def __call__(self, output: Any) -> Any:
        self.calls += 1
        self.first = output if self.first is None else self.first
        return tree_map(self._value_of_first, output, self.first)

    @staticmethod
    def _value_of_first(now: Any, first: Any) -> Any:
        # Still a function of the image, or the attack would have nothing to differentiate.
        floating = isinstance(now, Tensor) and now.is_floating_point()
        return first.detach() + 0 * now if floating else first


def pass_features_through(model: ComposerModel, path: str, function: Callable[[Any], Any]) -> None:
    """Replace what an encoder returns, a module or a method, by a function of it."""
    owner, name, encoder = resolve_encoder(model, path)
    if isinstance(encoder, nn.Module):
        encoder.register_forward_hook(lambda module, args, output: function(output))
    else:
        setattr(owner, name, lambda *args, **kwargs: function(encoder(*args, **kwargs)))


def losses_on_frozen_features(setting: Setting, model: ComposerModel) -> tuple[dict[str, Tensor], int]:
    """A step whose adversarial images differ from the clean ones, and whose features do not."""
    aemim = AEMIM(epsilon=8, adapter="none", **setting.arguments)
    frozen = Frozen()
    pass_features_through(model, setting.encoder, frozen)
    aemim.attach(model)
    losses = aemim.training_loss(model, setting.batch(0), step=0)
    return losses, frozen.calls


@every_setting
def test_the_target_of_the_adversarial_pass_is_the_clean_image(setting: Setting) -> None:
    """With equal features only the target could make the losses differ."""
    losses, calls = losses_on_frozen_features(setting, setting.build())
    assert calls == 4  # clean, two attack steps, adversarial
    torch.testing.assert_close(losses["adversarial"], losses["clean"], rtol=1e-6, atol=0)


class Leaking(MAE):
    """Reconstructs what its encoder has seen."""

    def forward(self, batch: Any, mask: Tensor | None = None) -> dict[str, Tensor]:
        seen: list[Tensor] = []
        hook = self.encoder.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        outputs = super().forward(batch, mask)
        hook.remove()
        return outputs | {"seen": seen[0]}

    def loss(self, outputs: dict[str, Tensor], batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        return super().loss(outputs, outputs["seen"])


def test_a_model_that_leaks_the_adversarial_image_into_its_target_is_caught() -> None:
    """The test above can fail."""
    setting = SETTINGS[0]
    model = setting.build()
    model.__class__ = Leaking
    losses, _ = losses_on_frozen_features(setting, model)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(losses["adversarial"], losses["clean"], rtol=1e-6, atol=0)
