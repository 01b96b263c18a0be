"""Attacks whose passes end at a layer inside of the encoder."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from composer.models import ComposerModel
from conftest import fit, loader, normalised_images, perturb, recorded_passes, tiny_mae
from settings import SETTINGS, Setting
from test_recomputation import wrap_blocks
from torch import Tensor, nn

from aemim_algorithm import AEMIM, adversarial_mode, apply_adapters, pgd_attack
from aemim_algorithm.attack import unit_gradient
from aemim_algorithm.losses import l2_distance
from aemim_algorithm.models import MAE
from aemim_algorithm.models.masking import visible_indices
from aemim_algorithm.plan import noise_of

LAYER = "encoder.blocks.0"


def attached(model: Any, **options: Any) -> AEMIM:
    aemim = AEMIM(**options)
    aemim.attach(model)
    perturb(model)
    return aemim


def test_the_images_are_those_of_an_attack_written_by_hand() -> None:
    model = tiny_mae(depth=3)
    aemim, images = attached(model, attack_layer=LAYER, steps=3), normalised_images(8)
    outputs, result = aemim.attack(model, images, step=5)

    def output_of_the_layer(given: Tensor) -> Tensor:
        kept: list[Tensor] = []
        hook = model.get_submodule(LAYER).register_forward_hook(lambda *a: kept.append(a[-1]))
        model.encoder(given, visible_indices(outputs["mask"], model.num_visible))
        hook.remove()
        return kept[0]

    reference = output_of_the_layer(images).detach()

    def objective(given: Tensor) -> Tensor:
        return l2_distance(unit_gradient(output_of_the_layer(given)), reference).sum()

    with adversarial_mode(model):
        noise = noise_of(seed=0, number=5, positions=torch.arange(8))(images)
        expected = pgd_attack(objective, images, epsilon=2.0, steps=3, noise=noise)
    assert torch.equal(result.images, expected)


def test_the_last_layer_is_the_encoders_end() -> None:
    images, results = normalised_images(8), []
    for layer in (None, "encoder.norm"):
        model = tiny_mae()
        _, result = attached(model, attack_layer=layer).attack(model, images, step=5)
        results.append(result)
    assert torch.equal(results[0].images, results[1].images)
    assert torch.equal(results[0].distances[-1], results[1].distances[-1])
    assert len(results[1].distances) == 1


def test_passes_of_the_attack_end_there() -> None:
    model = tiny_mae(depth=3)
    aemim, calls = attached(model, attack_layer="encoder.blocks.1", steps=4), [0, 0, 0]

    def count(number: int, *_: Any) -> None:
        calls[number] += 1

    for number, block in enumerate(model.encoder.blocks):
        block.register_forward_pre_hook(partial(count, number))
    aemim.training_loss(model, normalised_images(8), step=0)["total"].backward()
    assert calls == [6, 6, 2]  # the clean and the adversarial pass go through all of them


def test_features_are_driven_further_than_by_noise() -> None:
    images, results = normalised_images(8), []
    for options in ({"attack_layer": LAYER, "step_size": 4.0}, {}):
        model = tiny_mae(depth=3)
        aemim = AEMIM(**options)  # type: ignore[arg-type]
        aemim.attach(model)
        torch.manual_seed(3)
        results.append(aemim.attack(model, images, step=0)[1])
    noise, *_, exact = (distance.mean() for distance in results[1].distances)
    assert 2 * noise < results[0].distances[-1].mean() < 2 * exact
    assert results[0].perturbation.max() <= 2 + 1e-4


FOREIGN = {
    "Hugging Face `ViTMAEForPreTraining`": "model.vit.encoder.layer.0",
    "Hugging Face `SwinForMaskedImageModeling`": "model.swin.encoder.layers.0",
    "`SimMIM` on a Swin Transformer": "encoder.layers.0",
    "convolutions with `BatchNorm2d`": None,  # the first of its layers
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_it_works_with_other_models(name: str, ratio: float) -> None:
    (setting,) = (setting for setting in SETTINGS if setting.name == name)
    if setting.needs_transformers:
        pytest.importorskip("transformers")
    model = setting.build()
    layer = FOREIGN[name] or first_layer(setting, model)
    aemim = attached(model, attack_layer=layer, adversarial_ratio=ratio, **setting.arguments)
    passes = recorded_passes(aemim)
    losses = aemim.training_loss(model, setting.batch(0), step=0)
    losses["total"].backward()
    (result,) = passes
    assert losses["total"].isfinite()
    assert len(result.images) == 8 * ratio
    assert (result.perturbation > 1.5).all()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def first_layer(setting: Setting, model: nn.Module) -> str:
    prefix = setting.encoder + "."
    return next(name for name, _ in model.named_modules() if name.startswith(prefix))


def test_recomputed_blocks_attack_alike() -> None:
    images, results = normalised_images(8), []
    for wrapped in (False, True):
        model = tiny_mae(depth=3)
        apply_adapters(model)
        if wrapped:
            assert wrap_blocks(model, keep=model.encoder) == 4
        inner = LAYER + "._checkpoint_wrapped_module" if wrapped else LAYER
        for layer in (inner, LAYER):
            copied = copy.deepcopy(model)
            aemim = attached(copied, attack_layer=layer)
            torch.manual_seed(3)
            results.append(aemim.attack(copied, images, step=0)[1].images)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_training_equals_eager_training() -> None:
    states = []
    for options in ({}, {"compile_config": {"backend": "aot_eager"}}):
        model = tiny_mae()
        fit(model, AEMIM(attack_layer=LAYER), duration="2ba", train_dataloader=loader(16), **options)
        states.append(model.state_dict())
    torch._dynamo.reset()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_the_distance_of_the_features_is_logged_after_the_last_step_only() -> None:
    model = tiny_mae()
    aemim = attached(model, attack_layer=LAYER)
    aemim.training_loss(model, normalised_images(8), step=0)
    metrics = aemim._get_step().metrics.compute()
    assert "aemim/feature_distance/last_step" in metrics
    assert "aemim/feature_distance/first_step" not in metrics


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attack_layer": "encoder.blocks.7"}, r"attack_layer='encoder.blocks.7': .* such as encoder\."),
        ({"attack_layer": "decoder.blocks.0"}, "inside of the encoder"),
        ({"attack_layer": "encoder"}, "inside of the encoder"),
        ({"attack_layer": 3}, "attack_layer=3: expected a dotted path"),
        ({"attack_layer": LAYER, "adversarial_loss": "reconstruction"}, "choose one"),
    ],
)
def test_what_cannot_be_attacked_is_refused_before_anything_changes(options: Any, said: str) -> None:
    model = tiny_mae()
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=said):
        AEMIM(**options).attach(model)
    assert set(model.state_dict()) == names
    assert not model.encoder._forward_hooks


def test_a_layer_that_is_not_called_is_named() -> None:
    model = tiny_mae()
    assert isinstance(model, MAE)
    model.encoder.spare = nn.Linear(3, 3)
    aemim = attached(model, attack_layer="encoder.spare")
    with pytest.raises(ValueError, match=r"attack_layer='encoder.spare' returned no floating-point tensor"):
        aemim.training_loss(model, normalised_images(8), step=0)


class Overwriting(ComposerModel):
    """Activations inside of the encoder and after it may overwrite what they are given."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(inplace), nn.GroupNorm(2, 8)
        )
        self.act, self.head = nn.ReLU(inplace), nn.Conv2d(8, 3, 1)

    def forward(self, batch: Tensor) -> Tensor:
        return self.head(self.act(self.encoder(batch)))

    def loss(self, outputs: Tensor, batch: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (outputs - batch).square().mean()


@pytest.mark.parametrize("layer", [None, "encoder.1"])
def test_what_overwrites_features_in_place_changes_nothing(layer: str | None) -> None:
    results = []
    for inplace in (False, True):
        model = Overwriting(inplace)
        aemim = AEMIM(attack_layer=layer)
        aemim.attach(model)
        results.append(aemim.attack(model, normalised_images(8), step=0)[1])
    assert torch.equal(results[0].images, results[1].images)
    assert torch.equal(results[0].distances[0], results[1].distances[0])


def test_a_checkpoint_from_before_the_argument_warns_of_it() -> None:
    state = {"repr": "AEMIM(epsilon=2.0, steps=2)"}
    with pytest.warns(UserWarning, match="attack_layer=None, now 'encoder.blocks.0'"):
        AEMIM(attack_layer=LAYER).load_state_dict(state)
    AEMIM().load_state_dict(state)
