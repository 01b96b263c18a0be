"""Arguments that change during a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from composer.core import Algorithm, Event, State
from composer.loggers import InMemoryLogger
from composer.optim import CosineAnnealingScheduler, ExponentialScheduler, LinearScheduler
from conftest import assert_same, fit, loader, normalised_images, tiny_mae

from aemim_algorithm import AEMIM


def logged(aemim: AEMIM, name: str, duration: str = "8ba", **options: Any) -> list[float]:
    logger = InMemoryLogger()
    fit(tiny_mae(), aemim, duration=duration, train_dataloader=loader(32), loggers=[logger], **options)
    return [float(value) for _, value in logger.data[name]]


def test_epsilon_grows_and_the_attack_uses_it() -> None:
    """8 batches, half of them growing: 0, 0.5, 1, 1.5, then 2."""
    aemim = AEMIM(epsilon="linear 0→2 over 0.5dur")
    expected = [0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    assert logged(aemim, "aemim/epsilon") == pytest.approx(expected)
    assert logged(aemim, "aemim/perturbation_linf") == pytest.approx(expected, abs=1e-4)


def test_epochs_are_counted_in_batches() -> None:
    """Four batches an epoch."""
    values = logged(AEMIM(epsilon="linear 0→2 over 2ep"), "aemim/epsilon", "3ep")
    assert values == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2, 2, 2])


def test_loss_ratio_follows_a_cosine() -> None:
    logger = InMemoryLogger()
    aemim = AEMIM(loss_ratio="cosine 1 -> 0.5 over 4ba")
    fit(tiny_mae(), aemim, duration="6ba", train_dataloader=loader(32), loggers=[logger])
    values = {
        name: [float(value) for _, value in logger.data[f"loss/train/{name}"]]
        for name in ("clean", "adversarial", "total")
    }
    for batch, (clean, adversarial, total) in enumerate(zip(*values.values(), strict=True)):
        ratio = 0.75 + 0.25 * math.cos(math.pi * min(batch / 4, 1))
        assert total == pytest.approx(ratio * clean + (1 - ratio) * adversarial, rel=1e-5)
    assert values["total"][0] == values["clean"][0]


@pytest.mark.parametrize("micro", [8, 4])
def test_the_share_of_adversarial_samples_grows(micro: int) -> None:
    sizes: list[float] = []

    class Watch(Algorithm):
        def match(self, event: Event, state: State) -> bool:
            return event == Event.BEFORE_LOSS

        def apply(self, event: Event, state: State, logger: Any) -> None:
            (aemim,) = (a for a in state.algorithms if isinstance(a, AEMIM))
            result = aemim._get_step().result
            sizes.append(0 if result is None else len(result.images))

    aemim = AEMIM(adversarial_ratio="linear 0.25→1 over 3ba")
    fit(tiny_mae(), aemim, Watch(), duration="4ba", micro=micro, train_dataloader=loader(32))
    batches = torch.tensor(sizes).view(4, -1).sum(dim=1).tolist()
    assert batches == [2, 4, 6, 8]


def test_a_schedule_of_composers_is_the_same_as_its_text() -> None:
    assert AEMIM(epsilon=LinearScheduler(0.0, 2.0, "0.1dur")) == AEMIM(epsilon="linear 0.0→2.0 over 0.1dur")
    assert AEMIM(loss_ratio=CosineAnnealingScheduler("20ep", 0.5)) == AEMIM(
        loss_ratio="cosine 1.0→0.5 over 20ep"
    )
    assert AEMIM(epsilon=LinearScheduler(0.1234567, 2.0, "1ep")).epsilon == "linear 0.1234567→2.0 over 1ep"

    class Bent(LinearScheduler):
        """No linear one, though a subclass."""

    with pytest.raises(ValueError, match="epsilon=.*expected a number"):
        AEMIM(epsilon=Bent(0.0, 2.0))
    aemim = AEMIM(epsilon=LinearScheduler(0.0, 2.0, "0.1dur"))
    assert eval(repr(aemim)) == aemim


def test_schedules_resume_bitwise(tmp_path: Any) -> None:
    aemim = AEMIM(epsilon="linear 0→4 over 1dur", adversarial_ratio="linear 1→0.25 over 4ba")
    whole, resumed = tiny_mae(), tiny_mae()
    fit(whole, aemim, duration="4ba", train_dataloader=loader(32))
    saving = dict(save_folder=str(tmp_path), save_interval="1ba", save_filename="{batch}.pt")  # noqa: C408
    fit(tiny_mae(), aemim, duration="4ba", train_dataloader=loader(32), **saving)
    fit(resumed, aemim, duration="4ba", train_dataloader=loader(32), load_path=str(tmp_path / "2.pt"))
    assert_same(resumed.state_dict(), whole.state_dict())


def test_a_schedule_that_is_shorter_than_a_batch_is_over_at_once() -> None:
    assert logged(AEMIM(epsilon="linear 0→2 over 0.1dur"), "aemim/epsilon", "4ba") == [2.0] * 4


def test_a_constant_is_not_logged() -> None:
    logger = InMemoryLogger()
    fit(tiny_mae(), AEMIM(), loggers=[logger])
    assert not any(name in logger.data for name in ("aemim/epsilon", "aemim/loss_ratio"))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("epsilon", "linear 0→2", "nor a schedule such as"),
        ("epsilon", "linear 0→2 over soon", "nor a schedule such as"),
        ("epsilon", "linear 0→2 over 0ba", "nor a schedule such as"),
        ("epsilon", "linear 0→2 over 30sec", "nor a schedule such as"),
        ("epsilon", "linear a→2 over 1ep", "nor a schedule such as"),
        ("epsilon", "quadratic 0→2 over 1ep", "nor a schedule such as"),
        (
            "epsilon",
            "linear 0→256 over 1ep",
            r"epsilon=256.0 is out of range: expected a number in \[0, 255\]",
        ),
        ("adversarial_ratio", "linear 0→1 over 1ep", r"adversarial_ratio=0.0 .*\(0, 1\]"),
        ("loss_ratio", "cosine 1→-0.5 over 1ep", r"loss_ratio=-0.5 .*\[0, 1\]"),
        ("loss_ratio", ExponentialScheduler(0.5), "loss_ratio=.*expected a number"),
        ("steps", "linear 1→2 over 1ep", "steps=.*expected an integer"),
    ],
)
def test_bad_schedules_get_one_line(argument: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        AEMIM(**{argument: value})
    assert "\n" not in str(error.value)


def test_a_schedule_needs_a_trainer() -> None:
    aemim, model = AEMIM(epsilon="linear 0→2 over 1ep"), tiny_mae()
    aemim.attach(model)
    with pytest.raises(ValueError, match="epsilon is a schedule, which needs a Trainer's time"):
        aemim.training_loss(model, normalised_images(4), step=0)


def test_an_attack_outside_of_training_takes_the_largest_value() -> None:
    aemim, model = AEMIM(epsilon="cosine 1→3 over 1ep", adversarial_ratio="linear 1→0.5 over 2ep"), tiny_mae()
    aemim.attach(model)
    assert (aemim.present("epsilon"), aemim.present("adversarial_ratio")) == (3.0, 1.0)
    _, result = aemim.attack(model, normalised_images(4), step=0)
    assert result.perturbation.max() == pytest.approx(3.0, abs=1e-4)
