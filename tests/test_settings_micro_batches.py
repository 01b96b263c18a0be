"""On every model of the table whose loss is a mean over samples, micro-batches add up to the batch."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from composer import Trainer
from settings import Setting, every_setting, with_mask_of_batch, without_randomness
from torch import Tensor

from aemim_algorithm import AEMIM
from aemim_algorithm.samples import map_tensors


def double(tensor: Tensor) -> Tensor:
    """Floating point in float64, the rest as it is."""
    return tensor.double() if tensor.is_floating_point() else tensor


def trained(setting: Setting, aemim: AEMIM, micro: int) -> dict[str, Tensor]:
    """The state after two steps in float64."""
    model = with_mask_of_batch(without_randomness(setting.build())).double()
    batches = [(setting.decided or setting.batch)(number) for number in range(2)]
    trainer = Trainer(
        model=model,
        train_dataloader=map_tensors(batches, double),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        algorithms=[aemim],
        max_duration="2ba",
        device="cpu",
        device_train_microbatch_size=micro,
        progress_bar=False,
        seed=7,
    )
    trainer.fit()
    trainer.close()
    return model.state_dict()


@pytest.mark.parametrize(
    "aemim_of", [AEMIM, partial(AEMIM, steps=1, adversarial_ratio=0.3)], ids=["all", "some"]
)
@every_setting
def test_the_split_changes_nothing(setting: Setting, aemim_of: Any) -> None:
    """The same samples, the same noise, the same weight for each."""
    if setting.indivisible:
        pytest.skip(setting.indivisible)
    aemim = aemim_of(**setting.arguments)
    whole = trained(setting, aemim, 8)
    fresh = setting.build().double().state_dict()
    assert any(not torch.allclose(whole[name], value, rtol=1e-3) for name, value in fresh.items())
    for micro in (4, 2):
        split = trained(setting, copy.deepcopy(aemim), micro)
        for name, value in whole.items():
            torch.testing.assert_close(split[name], value, rtol=1e-4, atol=1e-9, msg=f"{name}, {micro}")
