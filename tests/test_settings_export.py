"""Every model of the table leaves training as the stock model it was, without AEMIM's copies."""

from __future__ import annotations

import torch
from composer.models import ComposerModel
from conftest import fit
from settings import Setting, every_setting
from torch import Tensor
from torch.utils._pytree import tree_leaves

from aemim_algorithm import AEMIM
from aemim_algorithm.adapters import adapters_of, adversarial_mode, remove_adapters


def outputs_of(model: ComposerModel, setting: Setting) -> list[Tensor]:
    """Every tensor that the model returns for a batch, under one state of the generators."""
    torch.manual_seed(5)
    with torch.no_grad():
        outputs = model.eval()(setting.batch(3))
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    """Bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_setting
def test_its_clean_state_loads_strictly_into_the_stock_model(setting: Setting) -> None:
    model, adapter = setting.build(), "both" if setting.class_token else "norm"
    stock_classes = {name: type(module) for name, module in model.named_modules()}
    fit(model, AEMIM(adapter=adapter, **setting.arguments), train_dataloader=setting.loader())
    expected = outputs_of(model, setting)
    with adversarial_mode(model):
        assert not equal(outputs_of(model, setting), expected)  # else the wrong branch would pass unseen

    clean = {name: value for name, value in model.state_dict().items() if "adversarial" not in name}
    fresh = setting.build(seed=1)
    assert not equal(outputs_of(fresh, setting), expected)
    fresh.load_state_dict(clean, strict=True)
    assert equal(outputs_of(fresh, setting), expected)

    count = len(adapters_of(model))
    assert remove_adapters(model) == count > 0
    assert {name: type(module) for name, module in model.named_modules()} == stock_classes
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert equal(outputs_of(model, setting), expected)
