"""Every model of the table resumes bitwise: weights, optimizer, generators, running statistics."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from conftest import fit
from settings import Setting, every_setting
from torch import Tensor
from torch.utils._pytree import tree_leaves

from aemim_algorithm import AEMIM
from aemim_algorithm.adapters import adapters_of
from aemim_algorithm.randomness import RngState


def end_of_run(trainer: Trainer) -> dict[str, Any]:
    """Everything that a run leaves behind."""
    (optimizer,) = trainer.state.optimizers
    return {
        "model": copy.deepcopy(trainer.state.model.state_dict()),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "rng": RngState.capture(),
        "batch": int(trainer.state.timestamp.batch),
    }


def require_equal(resumed: dict[str, Any], whole: dict[str, Any]) -> None:
    """Bit by bit, and in the same order."""
    assert list(resumed["model"]) == list(whole["model"])
    different = [k for k, value in whole["model"].items() if not torch.equal(value, resumed["model"][k])]
    assert not different
    assert resumed["batch"] == whole["batch"] == 4
    assert resumed["rng"] == whole["rng"]
    pairs = zip(tree_leaves(resumed["optimizer"]), tree_leaves(whole["optimizer"]), strict=True)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.filterwarnings("ignore:.*AEMIM.*:UserWarning")
@every_setting
def test_two_batches_and_two_after_loading_are_four(setting: Setting, tmp_path: Path) -> None:
    aemim = AEMIM.fast(**setting.arguments)
    saving: dict[str, Any] = {"save_folder": str(tmp_path), "save_filename": "{batch}.pt"}
    whole = end_of_run(fit(setting.build(), aemim, duration="4ba", train_dataloader=setting.loader()))
    fit(
        setting.build(),
        copy.deepcopy(aemim),
        train_dataloader=setting.loader(),
        save_interval="2ba",
        **saving,
    )
    checkpoint = str(tmp_path / "2.pt")

    torch.manual_seed(123)
    model = setting.build(seed=9)
    arguments: dict[str, Any] = {"duration": "4ba", "load_path": checkpoint}
    given = fit(model, copy.deepcopy(aemim), train_dataloader=setting.loader(), **arguments)
    require_equal(end_of_run(given), whole)

    model = setting.build(seed=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        added = fit(model, train_dataloader=setting.loader(), **arguments)
    assert any(repr(aemim) in str(warning.message) for warning in caught)
    require_equal(end_of_run(added), whole)
    assert adapters_of(model)
