"""Adapters: which parameters a branch uses, where they live, and what trains them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import tiny_mae
from timm.layers import LayerNorm2d, RmsNorm
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from aemim_algorithm import adversarial_mode, apply_adapters, remove_adapters
from aemim_algorithm.adapters import adapters_of, adversarial_parameters, preserved_buffers


class Convolutional(nn.Sequential):
    """Every kind of norm once."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), LayerNorm2d(8),
            nn.Flatten(2), nn.LayerNorm(196), nn.RMSNorm(196), RmsNorm(196),
        )  # fmt: skip


def perturb(model: nn.Module, seed: int = 1) -> None:
    """Make the adversarial copies differ: equal ones hide every switch bug."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adversarial_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_norms_of_every_kind_get_a_copy_under_their_own_key(images: Tensor) -> None:
    model = Convolutional()
    stock = {name: value.clone() for name, value in model.state_dict().items()}
    assert apply_adapters(model) == 6
    state = model.state_dict()
    clean = {name: value for name, value in state.items() if "adversarial" not in name}
    assert list(clean) == list(stock)
    assert all(torch.equal(clean[name], stock[name]) for name in stock)
    norms = {name for name in stock if not name.startswith("0.")}
    assert {n.replace("adversarial.", "") for n in state if "adversarial" in n} == norms
    assert isinstance(model[5], nn.LayerNorm)


@pytest.mark.parametrize("adapter", ["norm", "cls_token"])
def test_each_mode_uses_its_own_parameters_and_no_others(images: Tensor, adapter: str) -> None:
    model = tiny_mae()
    count = apply_adapters(model, adapter)
    assert count == {"norm": 2 * 2 + 1 + 2 + 1, "cls_token": 1}[adapter]
    before = model.encoder(images)
    perturb(model)
    assert torch.equal(model.encoder(images), before)
    with adversarial_mode(model):
        adversarial = model.encoder(images)
    assert not torch.allclose(adversarial, before, atol=1e-2)
    assert torch.equal(model.encoder(images), before)

    with torch.no_grad():  # the other way round: clean adapters do not reach the adversarial branch
        for adapter_module in adapters_of(model):
            for clean, _ in adapter_module.twins():
                clean.add_(1)
    with adversarial_mode(model):
        assert torch.equal(model.encoder(images), adversarial)


def test_gradients_reach_the_adapters_of_the_mode_only(images: Tensor) -> None:
    model = tiny_mae()
    apply_adapters(model)
    model.loss(model(images), images).backward()
    assert all(p.grad is None for p in adversarial_parameters(model))
    model.zero_grad()
    with adversarial_mode(model):
        model.loss(model(images), images).backward()
    pairs = [pair for adapter in adapters_of(model) for pair in adapter.twins()]
    assert all(clean.grad is None and copy.grad is not None for clean, copy in pairs)


def test_mode_is_restored_after_an_exception_and_nests() -> None:
    model = tiny_mae()
    apply_adapters(model)
    with pytest.raises(RuntimeError, match="out of memory"), adversarial_mode(model):
        with adversarial_mode(model):
            pass
        assert all(adapter.adversarial_mode for adapter in adapters_of(model))
        raise RuntimeError("out of memory")
    assert not any(adapter.adversarial_mode for adapter in adapters_of(model))


def test_twice_is_once() -> None:
    model = tiny_mae()
    optimizer = torch.optim.AdamW(model.parameters())
    assert apply_adapters(model, "norm", optimizer) == apply_adapters(model, "norm", [optimizer])
    assert sum("adversarial" in name for name in model.state_dict()) == 2 * 8
    parameters = optimizer.param_groups[0]["params"]
    assert len(parameters) == len(set(map(id, parameters))) == len(list(model.parameters()))


def test_copies_join_the_group_of_their_twin() -> None:
    """Weights and biases in different groups, as recipes without decay on biases have them."""
    model = tiny_mae()
    names = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in names.items() if n.endswith("weight")], "lr": 0.1},
        {"params": [p for n, p in names.items() if n.endswith("bias")], "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups)
    apply_adapters(model, "norm", optimizer)
    for name, parameter in model.named_parameters():
        if "adversarial" in name:
            group = optimizer.param_groups[0 if name.endswith("weight") else 1]["params"]
            assert any(parameter is p for p in group), name


def test_frozen_twins_stay_out_of_the_optimizer() -> None:
    model = tiny_mae()
    optimizer = torch.optim.SGD(model.decoder.parameters())
    apply_adapters(model, "norm", optimizer)
    trained = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert not any(id(p) in trained for p in adversarial_parameters(model.encoder))
    assert all(id(p) in trained for p in adversarial_parameters(model.decoder))


@pytest.mark.parametrize("adapter", ["norm", "cls_token"])
def test_removal_gives_the_stock_model_back(images: Tensor, adapter: str) -> None:
    model, stock = tiny_mae(), tiny_mae()
    count = apply_adapters(model, adapter)
    perturb(model)
    assert remove_adapters(model) == count
    assert remove_adapters(model) == 0
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert list(model.state_dict()) == list(stock.state_dict())
    assert torch.equal(model.encoder(images), stock.encoder(images))


@pytest.mark.parametrize("adapter", ["norm", "cls_token"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_are_independent(images: Tensor, adapter: str, duplicate: object) -> None:
    model = tiny_mae()
    apply_adapters(model, adapter)
    perturb(model)
    twin = duplicate(model)  # type: ignore[operator]
    assert list(twin.state_dict()) == list(model.state_dict())
    with adversarial_mode(twin):
        adversarial = twin.encoder(images)
        assert not torch.allclose(model.encoder(images), adversarial)
    with adversarial_mode(model):
        assert torch.equal(model.encoder(images), adversarial)


def test_hooks_of_a_norm_run_once_in_either_mode(images: Tensor) -> None:
    model, calls = tiny_mae(), []
    model.encoder.norm.register_forward_hook(lambda *_: calls.append(1))
    apply_adapters(model)
    with adversarial_mode(model):
        model.encoder(images)
    assert len(calls) == 1


def test_running_statistics_are_separate_and_can_be_preserved(images: Tensor) -> None:
    model = Convolutional()
    apply_adapters(model)
    clean, adversarial = model[1], model[1].adversarial
    with adversarial_mode(model):
        model(images)
        assert adversarial.num_batches_tracked == 1
        with preserved_buffers(model):
            model(images)
        assert adversarial.num_batches_tracked == 1
        with preserved_buffers(model, clean_only=True):
            model(images)
    assert adversarial.num_batches_tracked == 2
    assert clean.num_batches_tracked == 0
    with preserved_buffers(model, clean_only=True):
        model(images).sum().backward()
    assert clean.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("adapter", "missing"), [("norm", "normalization layer"), ("cls_token", "cls_token")]
)
def test_nothing_to_adapt_is_an_error(adapter: str, missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        apply_adapters(nn.Sequential(nn.Linear(2, 2)), adapter)


def test_unknown_adapter_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'norm'"):
        apply_adapters(tiny_mae(), "norms")


def test_a_projection_is_no_norm_whatever_its_name() -> None:
    class NormedLinear(nn.Linear):
        """A leaf with parameters."""

    class NormalizedProjection(nn.Linear):
        """Likewise."""

    model = nn.Sequential(
        NormedLinear(4, 4), NormalizedProjection(4, 4), nn.LayerNorm(4), GlobalResponseNorm(4)
    )
    assert apply_adapters(model) == 2
    assert not any(hasattr(model[i], "adversarial") for i in (0, 1))
