"""Adapters × adversarial losses × shares × steps, over every model of the table.

Not every product on every model: each model sees every value, and the table every pair.
"""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
import torch
from composer.models import ComposerModel
from conftest import recorded_passes
from settings import BATCH_SIZE, SETTINGS, Setting, every_setting, without_randomness
from test_settings_training import perturbed

from aemim_algorithm import AEMIM
from aemim_algorithm.adapters import adapters_of
from aemim_algorithm.attack import linf_distance, outside_pixel_range

ADAPTER = ("norm", "none", "cls_token", "both")
LOSS = ("l2", "kl", "reconstruction")
RATIO = (1.0, 0.25, 0.6)
STEPS = (1, 3)


def selection(setting: Setting) -> list[dict[str, Any]]:
    """Options that hold every value at least once, others for each model."""
    turn = SETTINGS.index(setting)
    adapters = ADAPTER if setting.class_token else ADAPTER[:2] * 2
    return [
        {
            "adapter": adapter,
            "adversarial_loss": LOSS[(row + turn) % 3],
            "adversarial_ratio": RATIO[(row + turn // 3) % 3],
            "steps": STEPS[(row + turn // 2 + row // 2) % 2],
        }
        for row, adapter in enumerate(adapters)
    ]


def values(options: list[dict[str, Any]], *names: str) -> set[tuple[Any, ...]]:
    """The combinations of these arguments that occur."""
    return {tuple(option[name] for name in names) for option in options}


def test_the_selection_covers_every_pair_and_each_model_every_value() -> None:
    every = {"adapter": ADAPTER, "adversarial_loss": LOSS, "adversarial_ratio": RATIO, "steps": STEPS}
    table = [option for setting in SETTINGS for option in selection(setting)]
    for first, second in combinations(every, 2):
        assert values(table, first, second) == set(product(every[first], every[second]))
    for setting in SETTINGS:
        for name, allowed in every.items():
            given = allowed if name != "adapter" or setting.class_token else ADAPTER[:2]
            assert values(selection(setting), name) == {(value,) for value in given}, setting.name


def trained_parameters(model: ComposerModel, loss: torch.Tensor) -> set[str]:
    """Names of the parameters that a loss reaches with a gradient other than zero."""
    model.zero_grad()
    loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@every_setting
def test_every_option_keeps_the_invariants_of_a_step(setting: Setting) -> None:
    plain, batch = without_randomness(setting.build()), setting.batch(0)
    reached = trained_parameters(plain, plain.loss(plain(batch), batch))
    for options in selection(setting):
        aemim = AEMIM(loss_ratio=0.0, epsilon=4.0, **options, **setting.arguments)
        model = perturbed(aemim, without_randomness(setting.build()))
        results = recorded_passes(aemim)
        losses = aemim.training_loss(model, batch, step=1)
        assert losses["total"].isfinite(), options
        assert torch.equal(losses["total"].detach(), losses["adversarial"])
        (result,) = results
        assert len(result.images) == round(options["adversarial_ratio"] * BATCH_SIZE)
        moved = linf_distance(result.images, result.clean_images, aemim.std)
        assert (moved < 4.0 + 1e-3).all()
        assert (moved > 2.0).all()
        assert outside_pixel_range(result.images, aemim.mean, aemim.std) < 1e-5
        assert all(distance.isfinite().all() for distance in result.distances)
        # L_a alone trains the copies in their twins' place, and all that has no copy.
        trained = trained_parameters(model, losses["total"])
        assert trained == {_name_in_branch(model, name) for name in reached}, options


def _name_in_branch(model: ComposerModel, name: str) -> str:
    """The parameter that the adversarial branch uses where the clean one uses ``name``."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    twins = {names[id(a)]: names[id(b)] for adapter in adapters_of(model) for a, b in adapter.twins()}
    return twins.get(name, name)


@pytest.mark.parametrize("adapter", ["cls_token", "both"])
@every_setting
def test_the_class_token_is_adapted_if_there_is_one(setting: Setting, adapter: str) -> None:
    aemim, model = AEMIM(adapter=adapter, **setting.arguments), setting.build()
    if setting.class_token:
        aemim.attach(model)
        names = [name for name, _ in model.named_parameters() if "adversarial_cls_token" in name]
        assert len(names) == 1
        return
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=f"adapter='{adapter}'.*cls_token") as error:
        aemim.attach(model)
    assert "\n" not in str(error.value)
    assert {name: type(module) for name, module in model.named_modules()} == before
