"""Every model of the table trains with AEMIM, and its clean path is what it is without."""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import Any

import pytest
import torch
from composer.loggers import InMemoryLogger
from composer.models import ComposerModel
from conftest import fit
from settings import SETTINGS, Setting, every_setting
from torch import Tensor

from aemim_algorithm import AEMIM
from aemim_algorithm.adapters import adapters_of, adversarial_parameters


def perturbed(aemim: AEMIM, model: ComposerModel, scale: float = 0.2) -> ComposerModel:
    """Attach and make the copies differ from the clean adapters, so that a wrong branch is seen."""
    aemim.attach(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adversarial_parameters(model):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def clean_state(model: ComposerModel) -> dict[str, Tensor]:
    """Parameters and buffers of the model without its copies."""
    return {name: value for name, value in model.state_dict().items() if "adversarial" not in name}


@every_setting
def test_one_line_trains_it(setting: Setting) -> None:
    logger, aemim, model = InMemoryLogger(), AEMIM(**setting.arguments), setting.build()
    fit(model, aemim, loggers=[logger], train_dataloader=setting.loader())
    value = {
        name: [float(v) for _, v in entries]
        for name, entries in logger.data.items()
        if name.startswith(("aemim/", "loss/"))
    }
    for name in ("clean", "adversarial", "total"):
        assert len(value[f"loss/train/{name}"]) == 2
        assert all(0 < loss < float("inf") for loss in value[f"loss/train/{name}"])
    assert all(1.0 < linf < 2.0 + 1e-3 for linf in value["aemim/perturbation_linf"])

    # The copies train as their twins do: what the loss does not reach stays in both.
    before = dict(setting.build().named_parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    twins = [pair for adapter in adapters_of(model) for pair in adapter.twins()]
    moved = [(clean, twin) for clean, twin in twins if not torch.equal(clean, before[names[id(clean)]])]
    assert len(moved) >= 2
    for clean, twin in twins:
        name = names[id(clean)]
        assert torch.equal(clean, before[name]) == torch.equal(twin, before[name]), name
    assert any(not torch.equal(clean, twin) for clean, twin in moved)

    _, result = aemim.attack(model, setting.batch(3), step=3)
    noise, *_, last = result.distances
    assert (last > noise).float().mean() > 0.7
    assert 0 < noise.mean() < last.mean()


@cache
def baseline(number: int) -> dict[str, Tensor]:
    """The clean state after two batches without AEMIM."""
    model = SETTINGS[number].build()
    fit(model, train_dataloader=SETTINGS[number].loader())
    return copy.deepcopy(model.state_dict())


# Without adapters the clean running statistics are in the way of every pass.
@pytest.mark.parametrize("variant", [AEMIM, partial(AEMIM.fast, adapter="none")], ids=["standard", "fast"])
@every_setting
def test_with_loss_ratio_one_it_equals_the_baseline_bitwise(setting: Setting, variant: Any) -> None:
    """Weights, running statistics, and the masks and dropout that come after."""
    aemim = variant(loss_ratio=1.0, **setting.arguments)
    model = perturbed(aemim, setting.build())
    fit(model, aemim, train_dataloader=setting.loader())
    stock, trained = baseline(SETTINGS.index(setting)), clean_state(model)
    assert list(stock) == list(trained)
    different = [name for name, value in stock.items() if not torch.equal(value, trained[name])]
    assert not different
