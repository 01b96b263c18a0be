"""bfloat16 autocast on a CPU, which Composer does not offer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from small_runs import recipe_in, write_images

from aemim_algorithm import AEMIM
from aemim_algorithm.callbacks.history import read_history
from aemim_algorithm.losses import total_loss
from aemim_algorithm.recipes.datasets import train_shards
from aemim_algorithm.recipes.preflight import prepare
from aemim_algorithm.recipes.pretrain import build_trainer, pretrain
from aemim_algorithm.recipes.training import fit, running

BF16 = "precision=amp_bf16"


class Rates(Callback):
    """Notes the learning rate of each batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        self.seen.append(state.optimizers[0].param_groups[0]["lr"])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", per_class=12)
    return folder


@pytest.mark.parametrize("adversarial", [True, False], ids=["aemim", "mae"])
def test_steps_are_those_with_only_the_forward_in_autocast(
    tmp_path: Path, images: Path, adversarial: bool
) -> None:
    """Independent steps: forward passes in autocast, backward and optimizer outside."""
    recipe = recipe_in(tmp_path, images, BF16, "max_duration=3ba", "schedule.warmup=0ba")
    recipe.algorithms = {"aemim": {"steps": 1}} if adversarial else {}
    trainer = build_trainer(recipe, prepare(recipe), train_shards(recipe.data))
    model, (optimizer,) = trainer.state.model, trainer.state.optimizers
    rates, batches = Rates(), []
    trainer.state.callbacks.append(rates)
    before = copy.deepcopy(model.state_dict())
    model.register_forward_pre_hook(lambda _, arguments: batches.append(arguments[0]))
    fit(trainer)
    trainer.close()
    trained = copy.deepcopy(model.state_dict())

    model.load_state_dict(before)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
    algorithm = AEMIM(steps=1, mean=recipe.data.mean, std=recipe.data.std)
    if adversarial:
        algorithm.attach(model, optimizer)
    for step, (batch, rate) in enumerate(zip(batches[:: 2 if adversarial else 1], rates.seen, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        # With a cache, the gradients of both branches would be summed in bfloat16.
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=not adversarial):
            if adversarial:
                loss = algorithm.training_loss(model, batch, step=step, seed=recipe.seed)["total"]
            else:
                loss = total_loss(model.loss(model(batch), batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name]), name
    assert any(not torch.equal(before[name], trained[name]) for name in before)


def test_it_is_another_arithmetic_and_the_weights_stay_float32(tmp_path: Path, images: Path) -> None:
    losses = {}
    for precision in ("fp32", "amp_bf16"):
        (tmp_path / precision).mkdir()
        recipe = recipe_in(tmp_path / precision, images, f"precision={precision}")
        outputs = pretrain(recipe)
        losses[precision] = [line["loss/train/total"] for line in read_history(tmp_path / precision / "run")]
        weights = torch.load(outputs.encoder, weights_only=True)
        assert {value.dtype for value in weights.values()} == {torch.float32}
    assert losses["amp_bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["amp_bf16"] != losses["fp32"]


def test_the_images_are_those_of_float32(tmp_path: Path, images: Path) -> None:
    """Cropping is a product of matrices: in autocast, half of the pixels would be others."""
    seen: dict[str, list[torch.Tensor]] = {}
    for precision in ("fp32", "amp_bf16"):
        (tmp_path / precision).mkdir()
        recipe = recipe_in(
            tmp_path / precision, images, f"precision={precision}", "data.resident=true", "max_duration=3ba"
        )
        trainer = build_trainer(recipe, prepare(recipe), train_shards(recipe.data))
        batches = seen.setdefault(precision, [])
        trainer.state.model.register_forward_pre_hook(
            lambda _, arguments, to=batches: to.append(arguments[0]["image"])
        )
        fit(trainer)
        trainer.close()
    for single, half in zip(seen["fp32"][::2], seen["amp_bf16"][::2], strict=True):  # not the attacked ones
        assert torch.equal(single, half)
    assert not torch.is_autocast_enabled("cpu")


def test_an_error_in_the_forward_leaves_no_autocast(tmp_path: Path, images: Path) -> None:
    recipe = recipe_in(tmp_path, images, BF16)
    trainer = build_trainer(recipe, prepare(recipe), train_shards(recipe.data))

    def fail(*_: object) -> None:
        raise RuntimeError("no luck")

    trainer.state.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no luck"), running(recipe, trainer):
        fit(trainer)
    assert not torch.is_autocast_enabled("cpu")
