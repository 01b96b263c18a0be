"""AEMIM beside other algorithms of Composer, in any order: the numbers, not that it finishes.

With ``loss_ratio=1`` a run must equal the one of the other algorithm alone. With 0.5 it must equal a plain
loop that takes AEMIM's loss and does by hand what the other algorithm is defined to do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from combinations import IN_ANY_ORDER, Combination, ConvolutionalMIM, conv
from composer.algorithms import (
    EMA,
    SAM,
    SWA,
    GhostBatchNorm,
    GradientClipping,
    LayerFreezing,
    LowPrecisionLayerNorm,
)
from composer.algorithms.low_precision_layernorm.low_precision_layernorm import LPLayerNorm
from composer.core import Algorithm, Event, Precision, State
from composer.models import ComposerModel
from conftest import assert_same, clean_part, fit, loader, perturb, tiny_mae
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from aemim_algorithm import AEMIM
from aemim_algorithm.adapters import DualNorm, adapters_of, apply_adapters

pytestmark = [
    pytest.mark.filterwarnings("ignore:SAM has known issues"),
    pytest.mark.filterwarnings("ignore:SWA has known issues"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),  # SAM hides the step
    pytest.mark.filterwarnings("ignore:Checkpoints with layer freezing"),
]


every_combination = pytest.mark.parametrize("combination", IN_ANY_ORDER, ids=lambda each: each.name)


def both_orders(aemim: AEMIM, other: Callable[[], Algorithm]) -> Iterable[list[Algorithm]]:
    yield [copy.deepcopy(aemim), other()]
    yield [other(), copy.deepcopy(aemim)]


def average_of(algorithm: Algorithm) -> dict[str, Tensor]:
    """What EMA or SWA has averaged; nothing of other algorithms."""
    if isinstance(algorithm, EMA):
        assert algorithm.ema_model is not None
        return algorithm.ema_model.named_parameters_dict
    if isinstance(algorithm, SWA):
        assert algorithm.swa_model is not None
        return algorithm.swa_model.state_dict()
    return {}


def train(build: Callable[[], ComposerModel], algorithms: list[Algorithm], **options: Any) -> Any:
    model = build()
    if any(isinstance(algorithm, AEMIM) for algorithm in algorithms):
        apply_adapters(model)
        perturb(model)
    if options.pop("momentum", False):
        options["optimizers"] = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return fit(model, *algorithms, duration="4ep", train_dataloader=loader(16), **options)


@every_combination
def test_with_loss_ratio_one_it_changes_nothing_for_the_other_algorithm(combination: Combination) -> None:
    build, other, options = combination.build, combination.algorithm, combination.options
    alone = other()
    expected = train(build, [alone], **options).state.model.state_dict()
    for algorithms in both_orders(AEMIM(loss_ratio=1.0), other):
        state = train(build, algorithms, **options).state.model.state_dict()
        assert len(state) > len(expected)
        assert_same(clean_part(state), expected, combination.rtol)
        (beside,) = (algorithm for algorithm in algorithms if not isinstance(algorithm, AEMIM))
        assert_same(clean_part(average_of(beside)), average_of(alone))


@every_combination
def test_the_order_in_the_list_does_not_matter(combination: Combination) -> None:
    build, other, options = combination.build, combination.algorithm, combination.options
    one, two = (
        train(build, algorithms, **options).state.model.state_dict()
        for algorithms in both_orders(AEMIM(), other)
    )
    assert_same(one, two)
    alone = train(build, [AEMIM()], **options).state.model.state_dict()
    if combination.name != "EMA":  # which leaves the trained weights alone
        assert any(not torch.equal(value, alone[key]) for key, value in one.items()), "it had no effect"


def by_hand(
    step: Callable[[nn.Module, SGD, Callable[[], dict[str, Tensor]]], None], epochs: int = 4
) -> nn.Module:
    """A plain loop: AEMIM's loss, and ``step`` in place of ``optimizer.step``."""
    model = tiny_mae()
    apply_adapters(model)
    perturb(model)
    optimizer, aemim = SGD(model.parameters(), lr=0.05, momentum=0.9), AEMIM()
    aemim.attach(model, optimizer)
    model.train()
    torch.manual_seed(7)  # as the Trainer does
    number = 0
    for _ in range(epochs):
        for batch in loader(16):

            def losses() -> dict[str, Tensor]:
                optimizer.zero_grad()
                loss = aemim.training_loss(model, batch, step=number, seed=7)  # noqa: B023
                loss["total"].backward()
                return loss

            step(model, optimizer, losses)
            number += 1
    return model


def trained_beside(other: Algorithm, **options: Any) -> dict[str, Tensor]:
    trainer = train(tiny_mae, [other, AEMIM()], momentum=True, **options)
    return trainer.state.model.state_dict()


def test_gradient_clipping_clips_the_gradient_of_both_branches() -> None:
    def step(model: nn.Module, optimizer: SGD, losses: Any) -> None:
        losses()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        assert norm > 0.05
        optimizer.step()

    assert_same(trained_beside(GradientClipping("norm", 0.05)), by_hand(step).state_dict(), 1e-5)


def test_sam_climbs_and_descends_on_the_whole_loss() -> None:
    """Foret et al. 2020, Eq. 4: both gradients are those of λ·L_c + (1−λ)·L_a, with the same noise."""

    def step(model: nn.Module, optimizer: SGD, losses: Any) -> None:
        losses()
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        climbs = [0.1 * p.grad / (norm + 1e-12) for p in parameters]
        with torch.no_grad():
            for parameter, climb in zip(parameters, climbs, strict=True):
                parameter.add_(climb)
        losses()
        with torch.no_grad():
            for parameter, climb in zip(parameters, climbs, strict=True):
                parameter.sub_(climb)
        optimizer.step()

    assert_same(trained_beside(SAM(rho=0.1)), by_hand(step).state_dict(), 1e-4)


def test_ema_averages_the_copies_too() -> None:
    average: dict[str, Tensor] = {}

    def step(model: nn.Module, optimizer: SGD, losses: Any) -> None:
        losses()
        optimizer.step()
        for name, parameter in model.named_parameters():
            start = average.get(name, parameter.detach().clone())
            average[name] = start * 0.5**0.5 + parameter.detach() * (1 - 0.5**0.5)

    by_hand(step)
    for first in (True, False):
        ema = EMA(half_life="2ba")
        algorithms: list[Algorithm] = [ema, AEMIM()] if first else [AEMIM(), ema]
        train(tiny_mae, algorithms, momentum=True)
        stored = average_of(ema)
        assert any("adversarial" in name for name in stored)
        assert_same(stored, {name: average[name] for name in stored}, 1e-5)


@pytest.mark.parametrize("other", [lambda: EMA(half_life="2ba"), lambda: SWA("1ep", "3ep", "1ba")])
@pytest.mark.parametrize("first", [True, False])
def test_averages_are_resumed(other: Callable[[], Algorithm], first: bool, tmp_path: Any) -> None:
    """The copy of the model that the checkpoint is loaded into has the adapters, whatever the order."""

    def run(**options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        average = other()
        algorithms: list[Algorithm] = [average, AEMIM()] if first else [AEMIM(), average]
        model = tiny_mae()
        options = {"optimizers": SGD(model.parameters(), lr=0.05, momentum=0.9)} | options
        fit(model, *algorithms, train_dataloader=loader(16), **options)
        return model.state_dict(), dict(average_of(average))

    whole = run(duration="4ep")
    saving = dict(save_folder=str(tmp_path), save_interval="1ep", save_filename="{epoch}.pt")  # noqa: C408
    run(duration="4ep", **saving)
    resumed = run(duration="4ep", load_path=str(tmp_path / "2.pt"))
    for one, two in zip(whole, resumed, strict=True):
        assert_same(one, two, 1e-6)


def test_layer_freezing_freezes_a_norm_with_its_copy() -> None:
    trainer = train(tiny_mae, [LayerFreezing(0.0, 1.0), AEMIM()])
    model = trainer.state.model
    trained = {id(p) for group in trainer.state.optimizers[0].param_groups for p in group["params"]}
    frozen = 0
    for adapter in adapters_of(model):
        for one, two in adapter.twins():
            assert one.requires_grad == two.requires_grad == (id(one) in trained) == (id(two) in trained)
            frozen += not one.requires_grad
    assert frozen > 4


@pytest.fixture
def cpu_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composer refuses autocast on the CPU: give it the CPU's."""

    def context(precision: str, *_: Any, **__: Any) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=Precision(precision) != Precision.FP32)

    monkeypatch.setattr("composer.trainer.trainer._validate_precision", lambda *_: None)
    monkeypatch.setattr("composer.trainer.trainer.get_precision_context", context)
    monkeypatch.setattr("aemim_algorithm.algorithm.get_precision_context", context)


@pytest.mark.usefixtures("cpu_autocast")
@pytest.mark.parametrize("first", [True, False])
def test_low_precision_layernorm_keeps_the_adapters(first: bool) -> None:
    """Composer runs it last, where it would replace them. (On the CPU its layers compute as stock ones.)"""
    baseline = fit(tiny_mae(), LowPrecisionLayerNorm(), precision="amp_bf16")
    other, aemim, model = LowPrecisionLayerNorm(), AEMIM(loss_ratio=1.0), tiny_mae()
    order: list[Algorithm] = [other, aemim] if first else [aemim, other]
    fit(model, *order, precision="amp_bf16")
    norms = [module for module in model.modules() if isinstance(module, DualNorm)]
    assert len(norms) == 8
    assert all(isinstance(norm, LPLayerNorm) and isinstance(norm.adversarial, LPLayerNorm) for norm in norms)
    assert_same(clean_part(model.state_dict()), baseline.state.model.state_dict())
    alone = tiny_mae()
    fit(alone, other, precision="amp_bf16")  # the same object, in a run without AEMIM
    assert isinstance(alone.encoder.norm, LPLayerNorm)


@pytest.mark.usefixtures("cpu_autocast")
@pytest.mark.parametrize("micro", [8, 4])
def test_autocast_reaches_every_pass(micro: int) -> None:
    """Attack and adversarial pass run in the Trainer's precision: with no budget the losses agree."""
    from composer.loggers import InMemoryLogger

    logger = InMemoryLogger()
    fit(tiny_mae(), AEMIM(epsilon=0, adapter="none"), precision="amp_bf16", micro=micro, loggers=[logger])
    clean_loss, adversarial = (
        [float(value) for _, value in logger.data[f"loss/train/{name}"]] for name in ("clean", "adversarial")
    )
    assert clean_loss == pytest.approx(adversarial, rel=1e-6)
    exact = InMemoryLogger()
    fit(tiny_mae(), AEMIM(epsilon=0, adapter="none"), micro=micro, loggers=[exact])
    in_float32 = [float(value) for _, value in exact.data["loss/train/clean"]]
    assert clean_loss != in_float32
    assert clean_loss == pytest.approx(in_float32, rel=0.02)
    assert logger.data["aemim/feature_distance/last_step"][0][1] == 0


@pytest.mark.parametrize("aemim_first", [True, False])
def test_ghost_batch_norm_goes_first_or_is_refused(aemim_first: bool) -> None:
    if aemim_first:
        with pytest.raises(
            ValueError, match="GhostBatchNorm comes after AEMIM and would replace its adapters"
        ):
            fit(conv(), AEMIM(), GhostBatchNorm(4))
    else:
        model = conv()
        fit(model, GhostBatchNorm(4), AEMIM())
        assert len(adapters_of(model)) == 1


def test_two_of_it_are_refused() -> None:
    with pytest.raises(ValueError, match="there are two AEMIM algorithms"):
        fit(tiny_mae(), AEMIM(), AEMIM(epsilon=1.0))


def test_a_stranger_that_replaces_the_adapters_is_refused() -> None:
    class Replaces(Algorithm):
        def match(self, event: Event, state: State) -> bool:
            return event == Event.INIT

        def apply(self, event: Event, state: State, logger: Any) -> None:
            state.model.encoder[2] = nn.BatchNorm2d(6)

    with pytest.raises(ValueError, match="another algorithm has replaced adapters of AEMIM"):
        fit(conv(), AEMIM(), Replaces())


def test_train_metrics_see_the_clean_outputs() -> None:
    from torchmetrics import MeanMetric

    class Measured(ConvolutionalMIM):
        def get_metrics(self, is_train: bool = False) -> dict[str, Any]:
            return {"mean": self.mean} if is_train else {}

        def eval_forward(self, batch: Any, outputs: Any = None) -> Any:
            return self.forward(batch) if outputs is None else outputs

        def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None:
            metric.update(outputs.double().abs().mean())

    values = []
    for algorithms in ([], [AEMIM(loss_ratio=1.0)]):
        torch.manual_seed(0)
        model = Measured()
        model.mean = MeanMetric()
        trainer = fit(model, *algorithms)
        values.append(float(trainer.state.train_metrics["mean"].compute()))
    assert values[0] == values[1] != 0


def test_evaluation_amid_training_is_as_without_it() -> None:
    class Evaluated(ConvolutionalMIM):
        def get_metrics(self, is_train: bool = False) -> dict[str, Any]:
            from torchmetrics import MeanMetric

            return {} if is_train else {"mean": MeanMetric()}

        def eval_forward(self, batch: Any, outputs: Any = None) -> Any:
            return self.decoder(self.encoder[1:](batch[0]))

        def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None:
            metric.update(outputs.mean())

    states = []
    for algorithms in ([], [AEMIM(loss_ratio=1.0)]):
        torch.manual_seed(0)
        model, data = Evaluated(), DataLoader(TensorDataset(*next(iter(loader(16, 16)))), batch_size=8)
        fit(model, *algorithms, eval_dataloader=data, eval_interval="1ba")
        states.append(clean_part(model.state_dict()))
    assert_same(*states)
