"""The clean backward ahead of the attack: the joint one's gradients, with one branch's activations at a time."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import DataSpec
from conftest import loader, normalised_images, perturb, tiny_mae
from settings import Setting, every_setting
from torch import Tensor
from torch.optim import SGD

from aemim_algorithm import AEMIM
from aemim_algorithm.models import MAE


def fitted(model: Any, batches: Any, aemim: AEMIM, micro: int, **options: Any) -> dict[str, Tensor]:
    """The parameters after the batches."""
    trainer = Trainer(
        model=model,
        train_dataloader=batches,
        optimizers=SGD(model.parameters(), lr=0.1, momentum=0.9),
        algorithms=[aemim],
        max_duration="1ep",
        device="cpu",
        device_train_microbatch_size=micro,
        progress_bar=False,
        seed=7,
        **options,
    )
    perturb(model)
    trainer.fit()
    trainer.close()
    return model.state_dict()


@pytest.mark.parametrize(
    ("aemim_of", "micro"), [(AEMIM, 8), (partial(AEMIM.fast, loss_ratio=0.3), 4)], ids=["all", "some"]
)
@every_setting
def test_it_trains_the_joint_backwards_parameters(setting: Setting, aemim_of: Any, micro: int) -> None:
    states = [
        fitted(setting.build(), setting.loader(), aemim_of(separate_backward=way, **setting.arguments), micro)
        for way in (False, True)
    ]
    start = setting.build().state_dict()
    assert any(not torch.allclose(states[0][name], value, rtol=1e-3) for name, value in start.items())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-6, msg=name)


class LiveActivations:
    """How many bytes autograd keeps between forward and backward, now and at most."""

    def __init__(self, model: MAE) -> None:
        self.now = self.peak = 0
        self._weights = {parameter.data_ptr() for parameter in model.parameters()}
        self._kept: dict[int, int] = {}

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)

    def pack(self, tensor: Tensor) -> Held:
        return Held(self, tensor)

    def add(self, tensor: Tensor, count: int) -> None:
        """Tensors that share memory count once."""
        key = tensor.untyped_storage().data_ptr()
        if tensor.data_ptr() in self._weights:
            return
        before, self._kept[key] = self._kept.get(key, 0), self._kept.get(key, 0) + count
        size = tensor.untyped_storage().nbytes()
        self.now += size * ((self._kept[key] > 0) - (before > 0))
        self.peak = max(self.peak, self.now)


class Held:
    def __init__(self, live: LiveActivations, tensor: Tensor) -> None:
        self.live, self.tensor = live, tensor.detach()
        live.add(self.tensor, 1)

    def __del__(self) -> None:
        self.live.add(self.tensor, -1)


def peak_of(aemim: AEMIM | None) -> int:
    model = tiny_mae(depth=4, decoder_depth=4).train()
    images, live = normalised_images(32), LiveActivations(model)
    if aemim is not None:
        aemim.attach(model)
    with live.hooks():
        if aemim is None:
            loss = model.loss(model(images), images)
        else:
            loss = aemim.training_loss(model, images, step=0)["total"]
        loss.backward()
    del loss
    assert live.now == 0
    return live.peak


def test_activations_of_one_branch_at_a_time_are_kept() -> None:
    plain, joint, separate = (peak_of(aemim) for aemim in (None, AEMIM(), AEMIM(separate_backward=True)))
    assert joint > 1.9 * plain
    assert separate < 1.05 * plain


def gradients(aemim: AEMIM, weight: float, given: float) -> dict[str, Tensor]:
    model = tiny_mae()
    aemim.attach(model)
    perturb(model)
    losses = aemim.training_loss(model, normalised_images(8), step=3, weight=given)
    (weight * losses["total"]).backward()
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def test_a_loop_of_ones_own_says_how_the_loss_is_weighted() -> None:
    expected = gradients(AEMIM(), 0.25, 1.0)
    actual = gradients(AEMIM(separate_backward=True), 0.25, 0.25)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-9, msg=name)


def test_another_weight_than_was_said_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"weighted otherwise .* training_loss\(weight=\.\.\.\)"):
        gradients(AEMIM(separate_backward=True), 0.25, 1.0)


def test_samples_that_are_not_counted_by_the_first_dimension_are_refused() -> None:
    def count(batch: Any) -> int:
        return 1 if 0 in batch[1] else 3

    data = DataSpec(loader(8), get_num_samples_in_batch=count)
    with pytest.raises(RuntimeError, match="leave out separate_backward"):
        fitted(tiny_mae(), data, AEMIM(separate_backward=True), 4)


def test_the_losses_that_are_logged_are_the_joint_ones() -> None:
    logged = []
    for separate in (False, True):
        model, aemim = tiny_mae(), AEMIM(separate_backward=separate, loss_ratio=0.3)
        aemim.attach(model)
        perturb(model)
        losses = aemim.training_loss(model, normalised_images(8), step=3)
        logged.append({name: float(value) for name, value in losses.items()})
    assert logged[0] == logged[1]
    assert logged[0]["clean"] != logged[0]["adversarial"]


def test_a_batch_of_which_nothing_is_attacked_trains_the_clean_branch() -> None:
    """Four micro-batches of two, one of eight samples attacked: three of them have no second backward."""
    fast = {"adversarial_ratio": 0.125, "steps": 1}
    states = [
        fitted(tiny_mae(), loader(16), AEMIM(separate_backward=way, **fast), 2) for way in (False, True)
    ]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_it_is_an_argument_like_the_others() -> None:
    aemim = AEMIM(separate_backward=True)
    assert "separate_backward=True" in repr(aemim)
    assert copy.deepcopy(aemim) == aemim != AEMIM()
    with pytest.raises(ValueError, match="separate_backward=1: expected True or False"):
        AEMIM(separate_backward=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("trained", ["adversarial", "norm"])
def test_a_model_of_which_one_branchs_adapters_alone_are_trained(trained: str) -> None:
    """Each backward but one has nothing to reach then."""
    states = []
    for separate in (False, True):
        model, aemim = tiny_mae(), AEMIM(separate_backward=separate)
        aemim.attach(model)
        perturb(model)
        for name, parameter in model.named_parameters():
            is_copy = "adversarial" in name
            parameter.requires_grad = is_copy if trained == "adversarial" else "norm" in name and not is_copy
        aemim.training_loss(model, normalised_images(8), step=0)["total"].backward()
        states.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(value is not None for value in states[0].values())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-9, msg=name)


def test_without_gradients_it_is_a_loss_like_any_other() -> None:
    losses = []
    for separate in (False, True):
        model, aemim = tiny_mae(), AEMIM(separate_backward=separate)
        aemim.attach(model)
        with torch.no_grad():
            losses.append(aemim.training_loss(model, normalised_images(8), step=0)["total"])
    assert losses[0].equal(losses[1])


class Meddling(MAE):
    """Its loss takes the mask out of the outputs, and runs the encoder once more."""

    def loss(self, outputs: dict[str, Tensor], batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        mask = outputs.pop("mask")
        with torch.no_grad():
            self.encoder(batch[0])
        return super().loss(outputs | {"mask": mask}, batch)


def test_what_a_loss_does_with_outputs_and_encoder_is_its_own_business() -> None:
    states = [
        fitted(
            tiny_mae(kind=Meddling), loader(8), AEMIM(adversarial_ratio=0.5, separate_backward=separate), 8
        )
        for separate in (False, True)
    ]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_resuming_with_the_other_order_needs_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AEMIM().load_state_dict({"repr": repr(AEMIM(separate_backward=True))})
