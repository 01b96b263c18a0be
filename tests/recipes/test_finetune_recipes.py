"""The recipes of fine-tuning that ship: Table 2 of the paper, value by value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from aemim_algorithm.data.augmentation import RandAugment
from aemim_algorithm.models import MODELS
from aemim_algorithm.recipes.schema import FineTuneRecipe, load_finetuning
from aemim_algorithm.recipes.training import learning_rate

YAMLS = Path(__file__).parents[2] / "yamls"
RECIPES = sorted((YAMLS / "finetune").glob("*.yaml"))

# Pre-trained for, backbone, epochs, base learning rate, layer decay: what differs in Table 2.
TABLE_2: dict[str, tuple[str, int, float, float]] = {
    "imagenet_vit_small_300ep": ("vit_small_patch16_224", 200, 1e-3, 0.8),
    "imagenet_vit_base_300ep": ("vit_base_patch16_224", 100, 1e-3, 0.7),
    "imagenet_vit_base_800ep": ("vit_base_patch16_224", 100, 5e-4, 0.65),
}


def load(path: Path) -> FineTuneRecipe:
    return load_finetuning(path, ["data.source=photos", "model.encoder=random"])


@pytest.mark.parametrize("name", TABLE_2)
def test_imagenet_recipes_are_table_2(name: str) -> None:
    backbone, epochs, base, decay = TABLE_2[name]
    recipe = load(YAMLS / "finetune" / f"{name}.yaml")
    assert (recipe.model.name, recipe.model.options, recipe.model.image_size) == (backbone, {}, 224)
    assert recipe.max_duration == f"{epochs}ep"
    assert recipe.optimizer.betas == (0.9, 0.999)
    assert recipe.optimizer.weight_decay == 0.05
    assert recipe.optimizer.layer_decay == decay
    assert recipe.optimizer.base_learning_rate == base
    assert recipe.global_batch_size == 2048
    assert learning_rate(recipe) == pytest.approx(base * 2048 / 256)
    assert (recipe.schedule.warmup, recipe.schedule.milestones) == ("5ep", [])
    assert recipe.model.drop_path == 0.1
    assert recipe.augmentation.randaugment == "rand-m9-mstd0.5-inc1"
    assert (recipe.augmentation.mixup, recipe.augmentation.cutmix) == (0.8, 1.0)
    assert recipe.augmentation.switch_prob == 0.5
    assert recipe.augmentation.label_smoothing == 0.1
    # Not in the table: the custom that it follows, that of MAE's fine-tuning.
    assert recipe.schedule.min_learning_rate == 1e-6
    assert recipe.data.crop_scale == (0.08, 1.0)
    assert recipe.evaluation_crop == 0.875
    assert recipe.data.mean == (0.485, 0.456, 0.406)
    assert recipe.data.std == (0.229, 0.224, 0.225)


def test_table_2_and_two_small_ones_are_all() -> None:
    assert {path.stem for path in RECIPES} == TABLE_2.keys() | {"cifar10_tiny", "photos"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_built(path: Path) -> None:
    recipe = load(path)
    RandAugment(recipe.augmentation.randaugment or "", image_size=32, mean=recipe.data.mean)
    name = recipe.model.name
    assert name is None or name in MODELS or timm.is_model(name)
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize(("backbone", "mae"), [
    ("vit_small_patch16_224", "mae_vit_small_patch16"),
    ("vit_base_patch16_224", "mae_vit_base_patch16"),
])  # fmt: skip
def test_timms_names_are_the_sizes_of_pre_training(backbone: str, mae: str) -> None:
    with torch.device("meta"):
        network: Any = timm.create_model(backbone, num_classes=0, global_pool="")
        encoder: Any = MODELS[mae]().encoder
    shapes = [{k: v.shape for k, v in each.state_dict().items()} for each in (network, encoder)]
    assert shapes[0] == shapes[1]
    assert network.blocks[0].attn.num_heads == encoder.blocks[0].attn.num_heads


def test_photos_starts_from_the_quickstart() -> None:
    recipe = load_finetuning(YAMLS / "finetune" / "photos.yaml")
    assert recipe.model.encoder == "runs/quickstart/encoder.pt"
    assert recipe.data.source == "photos"
