"""Every YAML that ships loads, names parts that exist, and says what the paper's Table 1 says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aemim_algorithm.algorithm import AEMIM
from aemim_algorithm.recipes.pretrain import learning_rate
from aemim_algorithm.recipes.registry import build_parts
from aemim_algorithm.recipes.schema import Recipe, load_recipe

YAMLS = Path(__file__).parents[2] / "yamls"
RECIPES = sorted(path for path in YAMLS.rglob("*.yaml") if path.parent.name != "_base")

METHODS: dict[str, dict[str, Any] | None] = {
    "mae": None,
    "aemim": {"steps": 2, "adversarial_ratio": 1.0},
    "aemim_fast": {"steps": 1, "adversarial_ratio": 0.25},
}
# backbone, epochs, warm-up epochs
RUNS = [("small", 300, 15), ("base", 300, 15), ("base", 800, 40)]


def load(path: Path) -> Recipe:
    return load_recipe(path, [] if path.stem == "quickstart" else ["data.source=photos"])


def aemim_of(recipe: Recipe) -> AEMIM | None:
    found = [part for part in build_parts(recipe).algorithms if isinstance(part, AEMIM)]
    return found[0] if found else None


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_names_parts_that_exist(path: Path) -> None:
    build_parts(load(path))


def test_every_base_is_used() -> None:
    text = "".join(path.read_text() for path in YAMLS.rglob("*.yaml"))
    assert [base.name for base in (YAMLS / "_base").iterdir() if base.name not in text] == []


def test_the_recipes_are_those_of_the_paper() -> None:
    expected = {f"imagenet_vit_{b}_{e}ep_{m}" for b, e, _ in RUNS for m in METHODS}
    expected |= {f"cifar10_tiny_{method}" for method in METHODS} | {"quickstart"}
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


def test_a_recipe_is_a_short_list_of_differences() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in RECIPES}
    assert {name: count for name, count in lengths.items() if count > 40} == {}
