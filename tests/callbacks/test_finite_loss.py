"""The guard for runs without AEMIM."""

from __future__ import annotations

import pytest
import torch
from conftest import fit, tiny_mae

from aemim_algorithm.callbacks import FiniteLoss


def test_a_nan_stops_the_run_before_the_step() -> None:
    model = tiny_mae()
    with torch.no_grad():
        model.decoder.head.bias[0] = float("inf")
    before = model.encoder.cls_token.clone()
    with pytest.raises(FloatingPointError, match="batch 0: the training loss is NaN or infinite"):
        fit(model, callbacks=[FiniteLoss()])
    assert torch.equal(model.encoder.cls_token, before)
    fit(tiny_mae(), callbacks=[FiniteLoss()])
