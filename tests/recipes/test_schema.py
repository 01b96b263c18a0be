"""Recipes: layers merge in order, come back from disk, and refuse what cannot run in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from aemim_algorithm.recipes.schema import Recipe, RecipeError, load_recipe, recipe_yaml, save_recipe

COMPLETE = """
model: {name: mae_vit_tiny_patch4, image_size: 32}
data: {source: photos, crop_scale: [0.2, 1.0]}
optimizer: {base_learning_rate: 1.5e-4, weight_decay: 0.05, betas: [0.9, 0.95]}
schedule: {warmup: 1ep, min_learning_rate: 0.0}
max_duration: 8ep
global_batch_size: 64
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.yaml", COMPLETE)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_recipe_is_named_after_its_file(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.run_name == "tiny"
    assert recipe.save_folder == "runs/tiny"
    assert load_recipe(recipe_file, ["run_name=other"]).save_folder == "runs/other"


def test_values_have_their_types(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert isinstance(recipe, Recipe)
    assert recipe.optimizer.base_learning_rate == 1.5e-4
    assert recipe.optimizer.betas == (0.9, 0.95)


def test_later_layers_win(recipe_file: Path) -> None:
    write(recipe_file.parent / "_base/a.yaml", "seed: 1\ncompile: true\nmax_duration: 2ep\n")
    write(recipe_file.parent / "_base/b.yaml", "bases: [../tiny.yaml]\nseed: 2\n")
    child = write(recipe_file.parent / "c.yaml", "bases: [_base/a.yaml, _base/b.yaml]\n")
    recipe = load_recipe(child, ["global_batch_size=128"])
    assert (recipe.seed, recipe.compile) == (2, True)
    assert recipe.max_duration == "8ep"  # tiny.yaml comes after a.yaml, as a base of b.yaml
    assert recipe.global_batch_size == 128


def test_the_file_wins_over_its_bases_and_sections_merge(recipe_file: Path) -> None:
    child = write(recipe_file.parent / "c.yaml", "bases: [tiny.yaml]\noptimizer: {weight_decay: 0.1}\n")
    optimizer = load_recipe(child).optimizer
    assert (optimizer.weight_decay, optimizer.base_learning_rate) == (0.1, 1.5e-4)


def test_a_saved_recipe_is_read_back_equal(recipe_file: Path) -> None:
    overrides = ["algorithms.aemim.steps=3", "callbacks.speed_monitor=null", "device=cpu"]
    recipe = load_recipe(recipe_file, overrides)
    saved = recipe_file.parent / "out/recipe.yaml"
    save_recipe(recipe, saved)
    assert load_recipe(saved) == recipe
    assert saved.read_text() == recipe_yaml(recipe)
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimiser.betas=[0, 0]", ["'optimiser'", "did you mean 'optimizer'?"]),
        ("optimizer.weight_dcay=1", ["optimizer.weight_dcay", "did you mean 'weight_decay'?"]),
        ("optimizer.zzz=1", ["optimizer.zzz", "base_learning_rate", "betas", "weight_decay"]),
        ("seed=abc", ["seed", "abc", "Integer"]),
        ("seed=1.5", ["seed", "1.5", "Integer"]),
        ("optimizer.weight_decay=much", ["optimizer.weight_decay", "much", "Float"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas", "length 1", "length 2"]),
        ("evaluate=maybe", ["evaluate", "maybe", "bool"]),
        ("device=tpu", ["device", "tpu", "cpu", "gpu"]),
        ("algorithms.aemim=3", ["algorithms.aemim", "3", "dict"]),
        ("optimizer=3", ["optimizer"]),
        ("model.name", ["model.name", "key=value"]),
        ("seed=[1", ["seed=[1"]),
    ],
)
def test_a_refused_override_is_named(recipe_file: Path, override: str, said: list[str]) -> None:
    line = refusal(recipe_file, override)
    assert line.startswith(f"override {override!r}")
    assert not [word for word in said if word not in line]


@pytest.mark.parametrize(
    "override",
    [
        "global_batch_size=0",
        "device_train_microbatch_size=0",
        "device_train_microbatch_size=most",
        "data.crop_scale=[0.5, 0.2]",
        "data.crop_scale=[0.2, 1.5]",
        "data.workers=-1",
        "data.resize=0",
        "data.std=[0.2, 0.0, 0.2]",
        "optimizer.base_learning_rate=0",
        "optimizer.weight_decay=-1",
        "optimizer.betas=[0.9, 1.0]",
        "schedule.min_learning_rate=-1",
        "schedule.milestones=[soon]",
        "schedule.milestones=[8ep]",
        "schedule.milestones=[100ba]",
        "schedule.milestones=[4ep, 2ep]",
        "schedule.step_factor=1",
        "max_duration=8",
        "max_duration=8 epochs",
        "save_interval=often",
        "schedule.warmup=8ep",
        "schedule.warmup=100sp",
        "data.cache_limit=much",
        "data.cache_limit=0",
        "data.cache_limit=10gb",
        "data.download_retries=-1",
        "data.download_retries=9",
        "data.download_timeout=0",
        "data.canonical_nodes=0",
        "data.canonical_nodes=3",
        "data.max_broken=-1",
    ],
)
def test_an_impossible_value_is_named(recipe_file: Path, override: str) -> None:
    key = override.partition("=")[0]
    line = refusal(recipe_file, override)
    assert str(recipe_file) in line
    assert f": {key}=" in line
    assert ": expected " in line


def test_steps_have_no_floor(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["schedule.milestones=[4ep, 6ep]"]).schedule.milestones == ["4ep", "6ep"]
    line = refusal(recipe_file, "schedule.milestones=[4ep]", "schedule.min_learning_rate=1e-5")
    assert "schedule.min_learning_rate=1e-05: expected 0 with milestones" in line


def test_a_missing_value_is_named(recipe_file: Path) -> None:
    bare = write(recipe_file.parent / "bare.yaml", COMPLETE.replace("max_duration: 8ep", ""))
    assert refusal(bare) == (f"{bare}: max_duration has no value: set it in the file or as max_duration=…")


def test_the_file_that_is_wrong_is_named(recipe_file: Path) -> None:
    base = write(recipe_file.parent / "base.yaml", "optimizer: {learning_rate: 1}\n")
    child = write(recipe_file.parent / "child.yaml", "bases: [tiny.yaml, base.yaml]\n")
    assert refusal(child).startswith(f"{base}: unknown key 'optimizer.learning_rate'")


def test_a_missing_base_is_named_with_the_file_that_asked(recipe_file: Path) -> None:
    child = write(recipe_file.parent / "child.yaml", "bases: [gone.yaml]\n")
    line = refusal(child)
    assert "gone.yaml: no such recipe file" in line
    assert str(child) in line


def test_a_cycle_of_bases_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "bases: [b.yaml]\n")
    write(tmp_path / "b.yaml", "bases: [a.yaml]\n")
    assert "bases form a cycle" in refusal(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [\n", "seed: 1\nseed: 2\n", "bases: x.yaml\n"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "odd.yaml", text)
    assert refusal(path).startswith(f"{path}: ")


def test_an_evaluation_needs_test_images(recipe_file: Path) -> None:
    photographs = load_recipe(recipe_file, ["evaluate=true"])
    assert photographs.evaluate
    source = f"data.source={recipe_file.parent}"
    assert "data.test_source=None" in refusal(recipe_file, "evaluate=true", source)
    assert "data.source=s3://bucket/x" in refusal(recipe_file, "evaluate=true", "data.source=s3://bucket/x")
    assert load_recipe(recipe_file, ["data.source=s3://bucket/x"]).data.source == "s3://bucket/x"


def test_a_cache_limit_is_for_remote_shards(recipe_file: Path) -> None:
    remote = "data.source=s3://bucket/x"
    assert load_recipe(recipe_file, [remote, "data.cache_limit=50gb"]).data.cache_limit == "50gb"
    assert load_recipe(recipe_file, [remote, "data.cache_limit=5000"]).data.cache_limit == 5000
    line = refusal(recipe_file, "data.cache_limit=50gb")
    assert line.endswith("data.cache_limit=50gb: expected null, as data.source is local")


def test_a_saved_recipe_is_read_where_its_data_is_not(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["data.source=moved/away"]).data.source == "moved/away"
