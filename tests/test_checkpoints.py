"""What happens when a run loads the checkpoint of another one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from composer import Trainer
from conftest import assert_same, clean_part, fit, loader, perturb, tiny_mae

from aemim_algorithm import AEMIM, apply_adapters
from aemim_algorithm.adapters import adapters_of
from aemim_algorithm.checkpoints import argument_differences


def saved(folder: Any, *algorithms: AEMIM) -> str:
    fit(tiny_mae(), *algorithms, train_dataloader=loader(32), save_folder=str(folder), save_interval="1ba",
        save_filename="{batch}.pt")  # fmt: skip
    return str(folder / "2.pt")


def messages(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if str(warning.message).startswith("AEMIM")]


def test_other_arguments_are_named_one_by_one(tmp_path: Any) -> None:
    path = saved(tmp_path, AEMIM())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(
            tiny_mae(),
            AEMIM(epsilon=4.0, steps=1),
            duration="3ba",
            train_dataloader=loader(32),
            load_path=path,
        )
    assert messages(caught) == [
        "AEMIM continues a run with other arguments: epsilon=2.0, now 4.0; steps=2, now 1"
    ]


def test_the_same_arguments_are_not_worth_a_word(tmp_path: Any) -> None:
    path = saved(tmp_path, AEMIM())
    fit(
        tiny_mae(), AEMIM(), duration="3ba", train_dataloader=loader(32), load_path=path
    )  # warnings are errors


@pytest.mark.filterwarnings("ignore:required_on_load algorithm")
@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (
            "norm",
            "cls_token",
            "copies of 16 parameters and buffers of norms and 0 class tokens, the model of 0",
        ),
        ("norm", "both", "the model of 16 parameters and buffers of norms and 1 class tokens"),
        ("both", "none", "copies of 16 parameters and buffers of norms and 1 class tokens, the model of 0"),
    ],
)
def test_other_adapters_are_refused_with_a_remedy(before: str, now: str, message: str, tmp_path: Any) -> None:
    path, model = saved(tmp_path, AEMIM(adapter=before)), tiny_mae()
    with pytest.raises(ValueError, match=message) as error:
        fit(model, AEMIM(adapter=now), duration="3ba", train_dataloader=loader(32), load_path=path)
    assert "pass AEMIM(adapter=...) as in the run that saved it" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_it_gives_its_parameters_to_the_copies(tmp_path: Any) -> None:
    path, model = saved(tmp_path), tiny_mae(seed=5)
    with pytest.warns(UserWarning, match="AEMIM: the checkpoint was trained without it"):
        Trainer(
            model=model,
            optimizers=torch.optim.AdamW(model.parameters()),
            algorithms=[AEMIM()],
            load_path=path,
            load_weights_only=True,
            device="cpu",
        ).close()
    weights = torch.load(path, weights_only=False)["state"]["model"]
    assert_same(clean_part(model.state_dict()), weights)
    pairs = [pair for adapter in adapters_of(model) for pair in adapter.twins()]
    assert all(torch.equal(clean, copied) for clean, copied in pairs)
    assert any(not torch.equal(clean, torch.ones_like(clean)) for clean, _ in pairs if clean.ndim == 1)


def test_state_dicts_go_there_and_back() -> None:
    one, other = tiny_mae(), tiny_mae(seed=3)
    for model in (one, other):
        AEMIM(adapter="both").attach(model)
    perturb(one)
    other.load_state_dict(one.state_dict())
    assert_same(one.state_dict(), other.state_dict())


def test_the_state_given_is_not_changed() -> None:
    model, plain = tiny_mae(), tiny_mae(seed=3)
    AEMIM().attach(model)
    state = plain.state_dict()
    names = list(state)
    with pytest.warns(UserWarning, match="trained without it"):
        model.load_state_dict(state)
    assert list(state) == names
    apply_adapters(plain)
    assert_same(model.state_dict(), plain.state_dict())


def test_a_saved_algorithm_that_cannot_be_read_is_compared_with_nothing() -> None:
    assert argument_differences("AEMIM(epsilon=", {"epsilon": 1}) == []
    assert argument_differences("AEMIM(epsilon=print())", {"epsilon": 1}) == []
    assert argument_differences("", {"epsilon": 1}) == []
    assert argument_differences("AEMIM(mean=(1.0, 2.0))", {"mean": (1.0, 2.0), "std": 3}) == []


@pytest.mark.parametrize("adapted", [False, True])
def test_a_part_of_a_checkpoint_can_be_loaded(adapted: bool) -> None:
    model, source = tiny_mae(), tiny_mae(seed=3)
    AEMIM().attach(model)
    if adapted:
        AEMIM().attach(source)
        perturb(source)
    encoder = {name: value for name, value in source.state_dict().items() if name.startswith("encoder.")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if not adapted else "error")
        result = model.load_state_dict(encoder, strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("decoder.") for name in result.missing_keys)
    loaded = {name: value for name, value in model.state_dict().items() if name in encoder}
    assert_same(loaded, encoder)
    norm = model.encoder.norm
    assert adapted != torch.equal(norm.adversarial.weight, norm.weight)
