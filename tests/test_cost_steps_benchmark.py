"""One training step: its FLOPs, the same passes by hand, and its parts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import benchmark_script

from aemim_algorithm import AEMIM
from aemim_algorithm.randomness import choose_samples, uniform_noise

TINY: dict[str, dict[str, Any]] = {
    "mae_vit_tiny_patch4": {
        "image_size": 16,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 2,
        "decoder_dim": 16,
        "decoder_depth": 2,
        "decoder_heads": 2,
    },
    "simmim_vit_tiny_patch4": {"image_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 2},
    "simmim_swin_tiny_patch2_window4": {
        "image_size": 16,
        "embed_dim": 8,
        "depths": (1, 2),
        "num_heads": (1, 2),
    },
}
MODEL = "mae_vit_tiny_patch4"


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark_script("cost", monkeypatch)


@pytest.fixture
def part(cost: ModuleType) -> Callable[[str], ModuleType]:
    """A module that the benchmark is made of."""
    return lambda name: sys.modules[name]


@pytest.fixture
def training(cost: ModuleType) -> ModuleType:
    return sys.modules["training"]


def tiny(training: ModuleType, model: str = MODEL, **changes: Any) -> Any:
    place = {"micro_batch": 4, "precision": "fp32", "device": "cpu", "threads": 1, "seed": 0}
    return training.Settings(**(place | {"model": model, "options": TINY[model]} | changes))


def test_vit_base_has_the_bounds_of_the_design(training: ModuleType, part: Any) -> None:
    settings = training.Settings("mae_vit_base_patch16", 4, "fp32", "cpu", 1, 0)
    bound = part("flops").bound_flops(settings, ["plain", "Fast AEMIM"])
    assert bound["AEMIM"] / bound["plain"] == pytest.approx(2.608, abs=0.005)
    assert bound["Fast AEMIM"] / bound["plain"] == pytest.approx(1.326, abs=0.005)
    # Without the patch embedding and biases, per token of width d: 24·d² and 4·d·tokens.
    encoder = 12 * 50 * (24 * 768**2 + 4 * 768 * 50)
    decoder = 8 * 197 * (24 * 512**2 + 4 * 512 * 197)
    assert bound["plain"] == pytest.approx(3 * (encoder + decoder), rel=0.03)
    assert bound["naive"] - bound["AEMIM"] == pytest.approx(encoder, rel=0.03)


@pytest.mark.parametrize("model", TINY)
def test_a_step_does_no_pass_that_the_algorithm_does_not_need(
    training: ModuleType, part: Any, model: str
) -> None:
    methods = ["plain", "AEMIM T=1", "AEMIM"]
    if model == MODEL:
        methods = [*training.METHODS, *training.BARE]
    settings = tiny(training, model)
    bound = part("flops").bound_flops(settings, methods)
    bound.pop("naive")
    assert part("flops").counted_flops(settings, methods) == bound


def test_flops_are_those_of_a_product_done_by_hand(part: Any) -> None:
    flops_of = part("flops").flops_of
    left, right = torch.ones(2, 3, 5), torch.ones(2, 5, 7)
    assert flops_of(lambda: left @ right) == 2 * (2 * 3 * 5 * 7)
    image = torch.ones(4, 5, requires_grad=True)
    layer = torch.nn.Linear(5, 6)
    # Forward, and backward to the image: the weights' gradient is not asked for.
    attack = flops_of(lambda: torch.autograd.grad(layer(image).sum(), image))
    assert attack == 2 * (2 * 4 * 5 * 6)


def test_every_method_trains_every_parameter_but_the_positions(training: ModuleType) -> None:
    for method in (*training.METHODS, *training.BARE):
        loop = training.Training(method, tiny(training))
        before = {name: value.detach().clone() for name, value in loop.model.named_parameters()}
        loop.step()
        still = {name for name, value in loop.model.named_parameters() if torch.equal(value, before[name])}
        assert still == {"encoder.pos_embed", "decoder.pos_embed"}, method
        assert any("adversarial" in name for name in before) == (method != "plain")


@pytest.mark.parametrize("ratio", [1.0, 0.25])
@pytest.mark.parametrize("model", TINY)
def test_bare_passes_give_the_gradients_of_aemim(
    training: ModuleType, part: Any, model: str, ratio: float
) -> None:
    settings = tiny(training, model, micro_batch=8)
    gradients = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        net = training.build(settings)
        optimizer = torch.optim.AdamW(net.parameters())
        batch = training.random_batch(net, settings)
        algorithm = AEMIM(steps=3, adversarial_ratio=ratio)
        torch.manual_seed(1)  # of the mask
        if by_hand:
            chosen = choose_samples(8, ratio, seed=0, batch=0)
            bare = part("bare").BarePasses(
                net,
                optimizer,
                algorithm,
                choose=lambda share, size, chosen=chosen: chosen,
                noise=lambda images, chosen=chosen: uniform_noise(
                    images.shape, seed=0, batch=0, positions=chosen
                ),
            )
            loss = bare.loss(batch)
        else:
            algorithm.attach(net, optimizer)
            loss = algorithm.training_loss(net, batch, step=0)["total"]
        loss.backward()
        gradients.append({name: value.grad for name, value in net.named_parameters() if value.requires_grad})
    assert list(gradients[0]) == list(gradients[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-6, msg=name)
    assert any("adversarial" in name and value.abs().sum() > 0 for name, value in gradients[0].items())


def test_the_parts_of_a_step_are_all_of_it(training: ModuleType, part: Any) -> None:
    breakdown = part("breakdown")
    threads = torch.get_num_threads()
    measured = {
        method: breakdown.breakdown(method, tiny(training), steps=2) for method in ("plain", "AEMIM T=3")
    }
    assert torch.get_num_threads() == threads
    for method, seconds in measured.items():
        assert set(seconds) == {"step", *breakdown.PARTS}
        assert sum(seconds[name] for name in breakdown.PARTS) == pytest.approx(seconds["step"])
        absent = {"attack", "adversarial forward"} if method == "plain" else set()
        assert {name for name in breakdown.PARTS if seconds[name] == 0} == absent
        assert min(seconds.values()) >= 0


def test_passes_inside_the_attack_are_the_attacks(part: Any) -> None:
    scopes = {
        "step": [(0.0, 100.0), (100.0, 200.0)],
        "step/forward": [(0.0, 10.0), (15.0, 25.0), (41.0, 48.0), (100.0, 110.0)],
        "aemim/attack": [(12.0, 40.0)],
        "aemim/adversarial_forward": [(40.0, 50.0)],
        "step/loss": [(30.0, 35.0), (50.0, 54.0)],
        "step/backward": [(60.0, 80.0), (160.0, 180.0)],
    }
    seconds = part("breakdown").parts_of(scopes)
    per_step = {name: round(value * 2e6) for name, value in seconds.items()}
    assert per_step == {
        "step": 200,
        "clean forward": 20,
        "attack": 28,
        "adversarial forward": 10,
        "losses": 4,
        "backward": 40,
        "optimizer": 0,
        "rest": 98,
    }


def test_kernels_count_for_the_scope_that_launched_them(part: Any) -> None:
    scopes = {"step": [(0.0, 100.0)], "step/forward": [(0.0, 10.0)], "step/backward": [(10.0, 20.0)]}
    # They run long after they were launched, and one of them outside of every scope.
    kernels = [(1.0, 30.0), (9.0, 5.0), (12.0, 40.0), (50.0, 2.0)]
    seconds = part("breakdown").parts_of(scopes, kernels)
    assert seconds["clean forward"] == pytest.approx(35e-6)
    assert seconds["backward"] == pytest.approx(40e-6)
    assert seconds["rest"] == pytest.approx(25e-6)  # the last kernel, and an idle GPU


def test_narrow_models_have_all_layers(training: ModuleType, part: Any) -> None:
    for model in ("mae_vit_small_patch16", "simmim_vit_base_patch16", "simmim_swin_base_patch4_window6"):
        settings = training.Settings(model, 4, "fp32", "meta", 1, 0)
        narrow = part("overhead").narrow(settings)
        whole, thin = training.build(settings), training.build(narrow)
        assert [type(module) for module in thin.modules()] == [type(module) for module in whole.modules()]
        sizes = [sum(value.numel() for value in net.parameters()) for net in (thin, whole)]
        assert sizes[0] < sizes[1] / 50
