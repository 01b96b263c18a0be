"""NaN and infinity: where they are put decides what the line names; a skipped batch leaves no trace in the weights."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from combinations import conv
from composer.algorithms import SAM, GradientClipping
from composer.core import Callback, State
from composer.loggers import InMemoryLogger, Logger
from conftest import assert_same, fit, normalised_images, tiny_mae
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from aemim_algorithm import AEMIM
from aemim_algorithm.callbacks import FiniteCheck

NAN = float("nan")


def batches(*poisoned: int, count: int = 3, image: int = 5) -> DataLoader:
    """Batches of 8 images; one image of each poisoned batch has a NaN in every patch."""
    images = normalised_images(8 * count)
    for number in poisoned:
        images[8 * number + image] = NAN
    return DataLoader(TensorDataset(images, torch.arange(len(images))), batch_size=8)


def poison_parameter(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = NAN


def message(*algorithms: Any, model: Any = None, **arguments: Any) -> str:
    """The line that a run ends with."""
    callbacks = arguments.pop("callbacks", [FiniteCheck()])
    with pytest.raises(FloatingPointError) as error:
        fit(model or tiny_mae(), *algorithms, callbacks=callbacks, duration="3ba", **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_image_is_named_by_its_position_in_the_batch() -> None:
    line = message(AEMIM(), train_dataloader=batches(1), micro=4)
    assert line.startswith("batch 1: the clean and the adversarial loss are NaN or infinite")
    assert "the input of sample 5 is not finite" in line


def test_a_parameter_is_named() -> None:
    model = tiny_mae()
    poison_parameter(model, "encoder.blocks.1.attn.proj.weight")
    line = message(model=model)
    assert line.startswith("batch 0: the training loss is NaN or infinite")
    assert "the parameter encoder.blocks.1.attn.proj.weight is not finite" in line


@pytest.mark.parametrize("branch", ["clean", "adversarial"])
def test_a_parameter_of_one_branch_is_named_with_it(branch: str) -> None:
    model, aemim = tiny_mae(), AEMIM()
    aemim.attach(model)
    twin = ".adversarial" if branch == "adversarial" else ""
    poison_parameter(model, f"decoder.norm{twin}.weight")
    line = message(aemim, model=model, callbacks=[])
    assert f"batch 0: the {branch} loss is NaN" in line
    assert f"the parameter decoder.norm{twin}.weight is not finite" in line


class Overflow(nn.Module):
    """Infinite from the second call on that it is armed for, without a parameter to blame."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: list[Any] = [model]
        self.armed: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        mode = self.model[0].decoder.norm.__dict__.get("adversarial_mode", False)
        return x * float("inf") if self.armed == mode else x


@pytest.mark.parametrize("branch", ["clean", "adversarial"])
def test_the_first_layer_whose_output_is_not_finite_is_named_with_its_branch(branch: str) -> None:
    model = tiny_mae()
    overflow = Overflow(model)
    model.decoder.blocks[0].mlp.act = nn.Sequential(model.decoder.blocks[0].mlp.act, overflow)
    overflow.armed = branch == "adversarial"
    line = message(AEMIM(), model=model, callbacks=[])
    assert f"batch 0: the {branch} loss is NaN" in line
    assert f"first in the output of decoder.blocks.0.mlp.act.1 ({branch} branch)" in line


def poison_gradients(model: nn.Module, *names: str, batch: int = 1) -> None:
    """From one backward pass on, whose number is that of the batch."""
    calls = dict.fromkeys(names, 0)

    def poison(name: str, gradient: Tensor) -> Tensor:
        calls[name] += 1
        return gradient * NAN if calls[name] == batch + 1 else gradient

    for name in names:
        model.get_parameter(name).register_hook(lambda gradient, name=name: poison(name, gradient))


def test_gradients_are_looked_at_before_they_are_clipped_and_named_from_the_loss_down() -> None:
    model = tiny_mae()
    poison_gradients(model, "encoder.blocks.0.attn.qkv.bias", "encoder.blocks.1.mlp.fc1.bias")
    clipping = GradientClipping(clipping_type="norm", clipping_threshold=1.0)
    line = message(clipping, model=model, train_dataloader=batches())
    assert "batch 1: the gradients of 2 parameters are NaN or infinite" in line
    assert "encoder.blocks.1.mlp.fc1.bias, encoder.blocks.0.attn.qkv.bias" in line
    assert "decoder" not in line


def test_gradients_of_adversarial_copies_name_the_branch() -> None:
    model, aemim = tiny_mae(), AEMIM()
    aemim.attach(model)
    poison_gradients(model, "encoder.norm.adversarial.bias", batch=0)
    line = message(aemim, model=model, callbacks=[])
    assert "batch 0: the gradients of 1 parameter are NaN or infinite (adversarial branch)" in line


def test_gradients_may_be_as_large_as_floats_are() -> None:
    """Their squares are infinite; they are not."""
    model = tiny_mae()
    model.encoder.norm.bias.register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    fit(model, callbacks=[FiniteCheck()], optimizers=torch.optim.SGD(model.parameters(), lr=1e-30))


def test_aemim_brings_the_check_once() -> None:
    own = FiniteCheck(on_nonfinite="skip", max_skips=3)
    for callbacks in ([], [own]):
        trainer = fit(tiny_mae(), AEMIM(), callbacks=callbacks)
        found = [callback for callback in trainer.state.callbacks if isinstance(callback, FiniteCheck)]
        assert found == (callbacks or found[:1])
        assert len(found) == 1


def plain(
    build: Callable[[], Any], data: DataLoader, *callbacks: Callback, micro: int = 8, **arguments: Any
) -> Any:
    """Train a model that draws nothing; what is returned holds weights and optimizer."""
    model = build()
    model.encoder[0] = nn.Identity()  # no random mask: batches are independent of those before
    optimizer = AdamW(model.parameters(), lr=1e-2)
    duration = f"{len(data)}ba"
    return fit(
        model,
        optimizers=optimizer,
        duration=duration,
        train_dataloader=data,
        callbacks=list(callbacks),
        micro=micro,
        **arguments,
    )


def values(trainer: Any) -> dict[str, Tensor]:
    """Weights, buffers and the optimizer's moments and steps."""
    (optimizer,) = trainer.state.optimizers
    moments = {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    return dict(trainer.state.model.state_dict()) | moments


@pytest.mark.parametrize("micro", [8, 4])
@pytest.mark.filterwarnings("ignore:batch 1.*skipped")
def test_a_skipped_batch_leaves_weights_statistics_and_optimizer_as_if_it_had_not_been(micro: int) -> None:
    whole = batches()
    images = whole.dataset.tensors[0]  # type: ignore[attr-defined]
    kept = DataLoader(TensorDataset(torch.cat([images[:8], images[16:]]), torch.arange(16)), batch_size=8)
    memory = InMemoryLogger()
    skipping = FiniteCheck(on_nonfinite="skip")
    skipped = plain(conv, batches(1), skipping, micro=micro, loggers=memory)
    assert_same(values(skipped), values(plain(conv, kept, micro=micro)))
    assert int(skipped.state.timestamp.batch) == 3
    assert [value for _, value in memory.data["train/skipped_batches"]] == [0, 1, 1]
    assert skipping.state_dict() == {"skipped": 1, "in_a_row": 0}


@pytest.mark.filterwarnings("ignore:batch 1.*skipped")
def test_aemim_goes_on_after_a_skipped_batch_as_after_one_without_gradients() -> None:
    class Drop(Callback):
        def after_train_batch(self, state: State, logger: Logger) -> None:
            if state.timestamp.batch == 1:
                for parameter in state.model.parameters():
                    parameter.grad = None

    skip = FiniteCheck(on_nonfinite="skip")
    skipped = fit(tiny_mae(), AEMIM(), duration="3ba", train_dataloader=batches(1), callbacks=[skip])
    dropped = fit(tiny_mae(), AEMIM(), duration="3ba", train_dataloader=batches(), callbacks=[Drop()])
    assert_same(values(skipped), values(dropped))


def test_a_skip_warns_and_too_many_in_a_row_stop() -> None:
    skip = FiniteCheck(on_nonfinite="skip", max_skips=2)
    with pytest.warns(UserWarning, match="the training loss.*skipped") as caught:
        fit(tiny_mae(), duration="5ba", train_dataloader=batches(1, 2, 4, count=5), callbacks=[skip])
    assert [str(warning.message).partition(":")[0] for warning in caught] == ["batch 1", "batch 2", "batch 4"]
    skip = FiniteCheck(on_nonfinite="skip", max_skips=2)
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(FloatingPointError, match="batch 3.*2 batches in a row"),
    ):
        fit(tiny_mae(), duration="5ba", train_dataloader=batches(1, 2, 3, count=5), callbacks=[skip])


def test_counts_survive_a_resume() -> None:
    skip = FiniteCheck(on_nonfinite="skip")
    skip.load_state_dict({"skipped": 4, "in_a_row": 10})
    with pytest.raises(FloatingPointError, match="10 batches in a row"):
        fit(tiny_mae(), train_dataloader=batches(0), callbacks=[skip])


@pytest.mark.filterwarnings("ignore:SAM has known issues")
def test_a_step_inside_the_optimizer_cannot_be_skipped() -> None:
    with pytest.raises(ValueError, match="skip.*SAM"):
        fit(tiny_mae(), SAM(), callbacks=[FiniteCheck(on_nonfinite="skip")])


@pytest.mark.parametrize(("arguments", "named"), [
    ({"on_nonfinite": "ignore"}, "on_nonfinite"),
    ({"max_skips": 0}, "max_skips"),
])  # fmt: skip
def test_bad_arguments(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        FiniteCheck(**arguments)


def test_the_diagnosis_changes_nothing() -> None:
    """Generators, buffers, modes and hooks are what they were."""
    model = conv()
    poison_parameter(model, "decoder.weight")
    before = copy.deepcopy(model.state_dict())
    message(model=model, train_dataloader=batches())
    after = model.state_dict()
    moved = {
        name
        for name, value in before.items()
        if not torch.equal(value.nan_to_num(), after[name].nan_to_num())
    }
    assert moved == {f"encoder.2.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert int(after["encoder.2.num_batches_tracked"]) == 1
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_it_finds_layers_of_a_compiled_model() -> None:
    model = conv()
    model.decoder = nn.Sequential(model.decoder, Infinite())
    line = message(model=model, train_dataloader=batches(), compile_config={"backend": "eager"})
    assert "first in the output of decoder.1" in line


class Infinite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float("inf")


def test_ranks_end_alike_where_one_has_a_nan(tmp_path: Path) -> None:
    """DDP and FSDP2; in a loss and in a gradient; stop and skip: see the worker."""
    worker = Path(__file__).with_name("finite_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    ranks = [(tmp_path / f"{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert len(ranks[0]) == 6
    for line in ranks[0]:
        kind, poisoned, outcome = line.split(" ", 2)
        assert kind in ("ddp", "fsdp2")
        if poisoned == "image":
            assert outcome.startswith("batch 1: the clean and the adversarial loss are NaN or infinite")
            assert "the input of sample 5 is not finite" in outcome
        elif poisoned == "gradient":
            assert outcome.startswith("batch 1: the gradients of ")
            assert "encoder.blocks.1.mlp.fc2.bias, encoder.blocks.1.mlp.fc2.weight" in outcome
        else:
            assert outcome == "1 skipped, finite"
