"""Every YAML that ships loads, names parts that exist, and says what the paper's tables say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aemim_algorithm.algorithm import AEMIM
from aemim_algorithm.recipes.registry import build_parts
from aemim_algorithm.recipes.schema import Recipe, load_recipe
from aemim_algorithm.recipes.training import learning_rate

YAMLS = Path(__file__).parents[2] / "yamls"
RECIPES = [*sorted((YAMLS / "pretrain").glob("*.yaml")), YAMLS / "quickstart.yaml"]

METHODS: dict[str, dict[str, Any] | None] = {
    "mae": None,
    "aemim": {"steps": 2, "adversarial_ratio": 1.0},
    "aemim_fast": {"steps": 1, "adversarial_ratio": 0.25},
}
# backbone, epochs, warm-up epochs
RUNS = [("small", 300, 15), ("base", 300, 15), ("base", 800, 40)]
SIMMIM = ["imagenet_simmim_swin_base_100ep", "imagenet_simmim_vit_base_800ep"]
SMALL_SIMMIM = ["cifar10_simmim_swin_tiny", "cifar10_simmim_vit_tiny"]
# Bases for controls of a benchmark: what each changes in AEMIM.
CONTROLS: dict[str, dict[str, Any]] = {"aemim_noise": {"steps": 0}, "aemim_no_adapter": {"adapter": "none"}}
OTHERS = {
    "simmim": [*SIMMIM, *SMALL_SIMMIM],
    "maskfeat": ["imagenet_maskfeat_vit_base_300ep", "cifar10_maskfeat_vit_tiny"],
    "beit": ["imagenet_beit_vit_base_800ep", "cifar10_beit_vit_tiny"],
}


def load(path: Path) -> Recipe:
    overrides = [] if path.stem == "quickstart" else ["data.source=photos"]
    if "_beit_" in path.stem:
        overrides.append("model.tokenizer=tokenizer.pt")
    return load_recipe(path, overrides)


def aemim_of(recipe: Recipe) -> AEMIM | None:
    found = [part for part in build_parts(recipe).algorithms if isinstance(part, AEMIM)]
    return found[0] if found else None


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_names_parts_that_exist(path: Path) -> None:
    build_parts(load(path))


def test_every_base_is_used() -> None:
    text = "".join(path.read_text() for path in YAMLS.rglob("*.yaml"))
    unused = {base.stem for base in (YAMLS / "_base").iterdir() if base.name not in text}
    assert unused <= set(CONTROLS)


def test_the_recipes_are_those_of_the_paper() -> None:
    expected = {f"imagenet_vit_{b}_{e}ep_{m}" for b, e, _ in RUNS for m in METHODS}
    expected |= {f"cifar10_tiny_{method}" for method in METHODS} | {"quickstart"}
    for baseline, runs in OTHERS.items():
        expected |= {f"{run}_{method}" for run in runs for method in (baseline, "aemim")}
    expected.add("cifar10_dvae_tiny")  # a tokenizer for BEiT
    assert {path.stem for path in RECIPES} == expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("backbone", "epochs", "warmup"), RUNS)
def test_imagenet_recipes_are_table_1(backbone: str, epochs: int, warmup: int, method: str) -> None:
    recipe = load(YAMLS / "pretrain" / f"imagenet_vit_{backbone}_{epochs}ep_{method}.yaml")
    assert recipe.model == {
        "name": f"mae_vit_{backbone}_patch16",
        "image_size": 224,
        "mask_ratio": 0.75,
        "norm_pixel_target": True,
        "decoder_dim": 512,
        "decoder_depth": 8,
        "decoder_heads": 16,
    }
    assert recipe.max_duration == f"{epochs}ep"
    assert recipe.schedule.warmup == f"{warmup}ep"
    assert recipe.schedule.min_learning_rate == 0
    assert recipe.global_batch_size == 4096
    assert learning_rate(recipe) == pytest.approx(1.5e-4 * 4096 / 256)
    assert recipe.optimizer.weight_decay == 0.05
    assert recipe.optimizer.betas == (0.9, 0.95)
    assert recipe.data.crop_scale == (0.2, 1.0)
    assert recipe.data.mean == (0.485, 0.456, 0.406)
    assert recipe.data.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("run", ["imagenet_vit_base_800ep", "cifar10_tiny"])
def test_the_methods_are_table_1(run: str, method: str) -> None:
    aemim = aemim_of(load(YAMLS / "pretrain" / f"{run}_{method}.yaml"))
    expected = METHODS[method]
    if expected is None:
        assert aemim is None
    else:
        assert aemim == AEMIM(epsilon=2.0, loss_ratio=0.5, adversarial_loss="l2", adapter="norm", **expected)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_differs_from_aemim_in_one_value(control: str, tmp_path: Path) -> None:
    bases = [str(YAMLS / "_base" / f"{name}.yaml") for name in ("mae_vit_tiny", "cifar10", control)]
    path = tmp_path / "recipe.yaml"
    path.write_text(f"bases: {bases}\n")
    assert aemim_of(load(path)) == AEMIM(**CONTROLS[control])


@pytest.mark.parametrize("method", ["simmim", "aemim"])
@pytest.mark.parametrize("run", SIMMIM)
def test_simmim_recipes_are_as_published(run: str, method: str) -> None:
    """SimMIM's two configurations; their rates are given for a batch of 512."""
    recipe = load(YAMLS / "pretrain" / f"{run}_{method}.yaml")
    swin = "swin" in run
    assert recipe.model == {"mask_ratio": 0.6, "mask_patch_size": 32} | (
        {"name": "simmim_swin_base_patch4_window6", "image_size": 192}
        if swin
        else {"name": "simmim_vit_base_patch16", "image_size": 224, "drop_path": 0.1}
    )
    assert recipe.max_duration == ("100ep" if swin else "800ep")
    assert recipe.global_batch_size == 2048
    assert learning_rate(recipe) == pytest.approx((2e-4 if swin else 1e-4) * 2048 / 512)
    assert recipe.schedule.warmup == "10ep"
    if swin:
        assert recipe.schedule.min_learning_rate == pytest.approx(1e-5 * 2048 / 512)
    else:
        assert (recipe.schedule.milestones, recipe.schedule.step_factor) == (["700ep"], 0.1)
    assert recipe.optimizer.weight_decay == 0.05
    assert recipe.optimizer.betas == (0.9, 0.999)
    assert recipe.data.crop_scale == (0.67, 1.0)
    assert recipe.algorithms["gradient_clipping"] == {"clipping_type": "norm", "clipping_threshold": 5.0}


@pytest.mark.parametrize("method", ["maskfeat", "aemim"])
def test_maskfeats_recipe_is_as_published(method: str) -> None:
    """SlowFast's in1k_VIT_B_MaskFeat_PT.yaml; both of its rates are given for a batch of 256."""
    recipe = load(YAMLS / "pretrain" / f"imagenet_maskfeat_vit_base_300ep_{method}.yaml")
    assert recipe.model == {
        "name": "maskfeat_vit_base_patch16",
        "image_size": 224,
        "mask_ratio": 0.4,
        "min_block": int(0.4 * 14 * 14) // 5,
    }
    assert (recipe.max_duration, recipe.schedule.warmup) == ("300ep", "30ep")
    assert recipe.global_batch_size == 2048
    assert learning_rate(recipe) == pytest.approx(2e-4 * 2048 / 256)
    assert recipe.schedule.min_learning_rate == pytest.approx(1e-6 * 2048 / 256)
    assert recipe.optimizer.weight_decay == 0.05
    assert recipe.optimizer.betas == (0.9, 0.999)
    assert recipe.data.crop_scale == (0.5, 1.0)
    assert recipe.algorithms["gradient_clipping"] == {"clipping_type": "norm", "clipping_threshold": 0.02}


@pytest.mark.parametrize("run", SIMMIM + SMALL_SIMMIM)
def test_aemim_on_simmim_is_table_9(run: str) -> None:
    assert aemim_of(load(YAMLS / "pretrain" / f"{run}_simmim.yaml")) is None
    aemim = aemim_of(load(YAMLS / "pretrain" / f"{run}_aemim.yaml"))
    expected: dict[str, Any] = {"epsilon": 2.0, "steps": 1, "adversarial_ratio": 1.0, "loss_ratio": 0.5}
    assert aemim == AEMIM(**expected, adversarial_loss="l2", adapter="norm")


def test_a_recipe_is_a_short_list_of_differences() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in RECIPES}
    assert {name: count for name, count in lengths.items() if count > 40} == {}
