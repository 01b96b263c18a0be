"""A failure anywhere in a step leaves the model as it was, and Composer's retry gives the right result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import Algorithm, Event, State
from conftest import loader, normalised_images, perturb, tiny_mae
from torch import Tensor, nn

from aemim_algorithm import AEMIM
from aemim_algorithm.adapters import adapters_of
from aemim_algorithm.models import MAE
from aemim_algorithm.randomness import RngState

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB"


class Dropping(MAE):
    """Draws its mask in forward, and drops out: only a replay of the generators can repeat it.

    And it has running statistics.
    """

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.bn = nn.BatchNorm1d(self.num_patches - self.num_visible)

    def forward(self, batch: Any) -> dict[str, Tensor]:  # type: ignore[override]
        outputs = super().forward(batch)
        return outputs | {"prediction": self.bn(outputs["prediction"])}


@contextmanager
def failing(owner: Any, name: str, *, call: int) -> Iterator[list[int]]:
    """``owner.name`` runs out of memory on its n-th call, once."""
    original, own, calls = getattr(owner, name), owner.__dict__.get(name), [0]

    def maybe(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise RuntimeError(OUT_OF_MEMORY)
        return original(*args, **kwargs)

    setattr(owner, name, maybe)
    try:
        yield calls
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)


# With T=2 and micro-batches of 8: the clean pass, two attack steps, the adversarial pass. The module of
# the encoder is called four times, the decoder twice, the loss twice.
STAGES: dict[str, Callable[[MAE], tuple[Any, str, int]]] = {
    "clean encoder": lambda model: (model.encoder.blocks, "forward", 1),
    "first attack step": lambda model: (model.encoder.blocks, "forward", 2),
    "second attack step": lambda model: (model.encoder.blocks, "forward", 3),
    "adversarial encoder": lambda model: (model.encoder.blocks, "forward", 4),
    "clean decoder": lambda model: (model.decoder, "forward", 1),
    "adversarial decoder": lambda model: (model.decoder, "forward", 2),
    "clean loss": lambda model: (model, "loss", 1),
    "adversarial loss": lambda model: (model, "loss", 2),
}


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_failed_step_leaves_no_trace(stage: str, separate: bool) -> None:
    """With a separate backward, the clean branch's gradients apart once they are there."""
    aemim, model = AEMIM(separate_backward=separate), tiny_mae(kind=Dropping)
    aemim.attach(model)
    perturb(model)
    model.train()
    images = normalised_images(8)

    def fail() -> None:
        owner, name, call = STAGES[stage](model)
        with failing(owner, name, call=call), pytest.raises(RuntimeError, match="out of memory"):
            aemim.training_loss(model, images, step=0)

    model.bn.momentum = model.bn.adversarial.momentum = 0.0  # passes that ended have been counted
    before = {name: value.clone() for name, value in model.state_dict().items() if "tracked" not in name}
    torch.manual_seed(5)
    fail()
    after = RngState.capture()
    assert not any(adapter.adversarial_mode for adapter in adapters_of(model))
    if not separate or stage.startswith("clean"):
        assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    tap = aemim._get_step().branch.tap
    assert tap._injected is tap._call is tap._entered is None
    assert not tap._recording
    if not stage.startswith("clean"):  # the generators stand where the clean forward left them
        torch.manual_seed(5)
        model(images)
        assert RngState.capture() == after


class Halve(Algorithm):
    """Two micro-batches from the second batch on, without any failure."""

    def match(self, event: Event, state: State) -> bool:
        return event == Event.BATCH_END

    def apply(self, event: Event, state: State, logger: Any) -> None:
        state.device_train_microbatch_size = 4


@contextmanager
def training(dropout: float, *algorithms: Algorithm, separate: bool = False) -> Iterator[tuple[Trainer, MAE]]:
    """Two batches of 8, in one piece each."""
    model = tiny_mae(kind=Dropping)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    trainer = Trainer(
        model=model, train_dataloader=loader(16), optimizers=torch.optim.SGD(model.parameters(), lr=0.05),
        algorithms=[AEMIM(separate_backward=separate), *algorithms], max_duration="2ba", device="cpu", seed=7, progress_bar=False,
        device_train_microbatch_size=8,
    )  # fmt: skip
    perturb(model)
    try:
        yield trainer, model
    finally:
        trainer.close()


@pytest.mark.filterwarnings("ignore:CUDA out of memory")
@pytest.mark.parametrize("stage", [*STAGES, "the optimizer's step"])
@pytest.mark.parametrize(("dropout", "separate"), [(0.0, False), (0.2, False), (0.2, True)])
def test_a_retry_with_smaller_micro_batches_is_as_if_it_had_started_with_them(
    stage: str, dropout: float, separate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise: masks, dropout, running statistics, choice, noise, gradients. The second batch fails."""
    monkeypatch.setattr("composer.trainer.trainer._is_cuda_oom", lambda error: OUT_OF_MEMORY in str(error))
    with training(dropout, separate=separate) as (trainer, retried):
        trainer.state.auto_microbatching = True  # Composer allows "auto" on GPUs only
        if stage in STAGES:
            owner, name, call = STAGES[stage](retried)
            per_batch = 4 if owner is retried.encoder.blocks else 2
        else:
            owner, name, call, per_batch = trainer.state.optimizers[0], "step", 1, 1
        with failing(owner, name, call=per_batch + call) as calls:
            trainer.fit()
        assert calls[0] > per_batch + call or stage not in STAGES
    with training(dropout, Halve(), separate=separate) as (trainer, smaller):
        trainer.fit()
    with training(dropout, separate=separate) as (trainer, whole):
        trainer.fit()
    expected, other = smaller.state_dict(), whole.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in retried.state_dict().items())
    assert any(not torch.equal(value, other[key]) for key, value in retried.state_dict().items())
