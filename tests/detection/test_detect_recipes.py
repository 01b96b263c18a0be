"""The recipes of detection that ship: Table 3 of the paper, value by value."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from composer.core import State, Time, Timestamp
from composer.optim import MultiStepWithWarmupScheduler

from aemim_algorithm.detection.model import Heads
from aemim_algorithm.detection.windows import global_positions
from aemim_algorithm.recipes.detect_schema import DetectRecipe, load_detection
from aemim_algorithm.recipes.training import _scheduler, learning_rate

YAMLS = Path(__file__).parents[2] / "yamls"
RECIPES = sorted((YAMLS / "detect").glob("*.yaml"))

# Backbone, learning rate, layer decay, drop path: what differs in Table 3.
TABLE_3 = {
    "coco_vit_small": ("vit_small_patch16_224", 2e-3, 0.75, 0.1),
    "coco_vit_base": ("vit_base_patch16_224", 3e-3, 0.65, 0.2),
}


def load(name: str) -> DetectRecipe:
    places = ["data.source=train", "data.test_source=val", "model.encoder=random"]
    return load_detection(YAMLS / "detect" / f"{name}.yaml", places)


@pytest.mark.parametrize("name", TABLE_3)
def test_coco_recipes_are_table_3(name: str) -> None:
    backbone, rate, decay, drop_path = TABLE_3[name]
    recipe = load(name)
    assert (recipe.model.name, recipe.model.options) == (backbone, {})
    assert timm.is_model(backbone)
    assert learning_rate(recipe) == pytest.approx(rate)
    assert (recipe.optimizer.layer_decay, recipe.model.drop_path) == (decay, drop_path)
    assert (recipe.optimizer.weight_decay, recipe.optimizer.betas) == (0.05, (0.9, 0.999))
    assert (recipe.global_batch_size, recipe.max_duration) == (16, "12ep")
    assert recipe.model.short_sides == [*range(480, 801, 32)]
    assert recipe.model.long_side == 1333
    assert recipe.algorithms == {}
    # Not in the table: torchvision's own heads, ViTDet's windows.
    assert recipe.model.heads == Heads()
    assert (recipe.model.window, recipe.model.global_blocks) == (14, 4)
    assert global_positions(12, recipe.model.global_blocks) == {2, 5, 8, 11}


@pytest.mark.parametrize("name", TABLE_3)
def test_the_rate_warms_up_for_500_steps_and_falls_at_9_and_11_epochs(name: str) -> None:
    scheduler = _scheduler(load(name))
    assert isinstance(scheduler, MultiStepWithWarmupScheduler)
    state = State.__new__(State)  # what a scheduler asks of it
    steps = 118_287 // 16
    state._max_duration = Time.from_timestring("12ep")
    state._dataloader_len = Time.from_batch(steps)
    state._dataloader_label = "train"

    def factor(batch: int) -> float:
        state.timestamp = Timestamp(epoch=batch // steps, batch=batch)
        return scheduler(state)

    found = [factor(batch) for batch in (0, 250, 500, 9 * steps - 1, 9 * steps, 11 * steps - 1, 11 * steps)]
    assert found == pytest.approx([0, 0.5, 1, 1, 0.1, 0.1, 0.01])


def test_table_3_and_a_small_one_are_all() -> None:
    assert {path.stem for path in RECIPES} == TABLE_3.keys() | {"tiny"}
    assert load("tiny").max_duration == "10ep"


def test_the_defaults_are_torchvisions_own() -> None:
    import inspect

    from torchvision.models.detection import MaskRCNN

    theirs = inspect.signature(MaskRCNN).parameters
    for name, value in vars(Heads()).items():
        if name in theirs:
            assert theirs[name].default == value, name
    assert torch.tensor([name in theirs for name in vars(Heads())]).sum() == 8
