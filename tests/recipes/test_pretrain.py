"""A recipe from an image folder to an encoder file: what it writes, how it resumes, what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.loggers import InMemoryLogger
from conftest import small_files
from small_runs import killed_at, recipe_in, write_images

from aemim_algorithm.cli import main
from aemim_algorithm.data import convert
from aemim_algorithm.recipes.datasets import train_shards
from aemim_algorithm.recipes.dry_run import dry_run
from aemim_algorithm.recipes.preflight import prepare
from aemim_algorithm.recipes.pretrain import (
    Outputs,
    build_trainer,
    parameter_groups,
    pretrain,
)
from aemim_algorithm.recipes.registry import build_parts
from aemim_algorithm.recipes.schema import Recipe, RecipeError, load_recipe
from aemim_algorithm.recipes.training import learning_rate

IMAGES = 32  # four batches per epoch


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", per_class=IMAGES // 2)
    write_images(folder / "test", per_class=8)
    return folder


def test_test_images_of_other_classes_are_refused_before_training(images: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "other", per_class=1)
    (tmp_path / "other" / "1").rename(tmp_path / "other" / "zebra")
    recipe = recipe_in(tmp_path, images, "evaluate=true", f"data.test_source={tmp_path / 'other'}")
    with pytest.raises(ValueError, match="the class 'zebra' is none of the 2"):
        pretrain(recipe)
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Outputs]:
    folder = tmp_path_factory.mktemp("finished")
    recipe = recipe_in(
        folder,
        images,
        "evaluate=true",
        f"data.test_source={images / 'test'}",
        "callbacks={speed_monitor: {window_size: 1}, LRMonitor: null}",
        f"loggers.file_logger.filename={folder}/log.txt",
    )
    return recipe, pretrain(recipe)


def encoder_of(outputs: Outputs) -> dict[str, torch.Tensor]:
    return torch.load(outputs.encoder, weights_only=True)


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def test_a_run_leaves_what_it_says(finished: tuple[Recipe, Outputs]) -> None:
    recipe, outputs = finished
    assert load_recipe(outputs.recipe) == recipe
    checkpoint = torch.load(outputs.checkpoint, weights_only=False)["state"]["model"]
    assert_equal(
        encoder_of(outputs),
        {
            name.removeprefix("encoder."): value
            for name, value in checkpoint.items()
            if name.startswith("encoder.") and "adversarial" not in name
        },
    )
    assert {name for name in checkpoint if "adversarial" in name}


def test_both_encoders_are_scored(finished: tuple[Recipe, Outputs]) -> None:
    scores = finished[1].scores
    assert scores.keys() == {"trained", "random"}
    for score in scores.values():
        # Dark against bright images: anything but a broken pipeline tells them apart.
        assert score["knn"] > 90
        assert score["linear"] > 90


def test_other_parts_of_composer_take_part(finished: tuple[Recipe, Outputs]) -> None:
    log = (Path(finished[0].save_folder).parent / "log.txt").read_text()
    assert "throughput/samples_per_sec" in log
    assert "lr-AdamW" in log
    assert "aemim/perturbation_linf" in log


def test_a_finished_run_can_be_started_again(
    finished: tuple[Recipe, Outputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(convert, "write_shards", refuse)
    recipe, outputs = finished
    before = encoder_of(outputs)
    again = pretrain(replace(recipe, evaluate=False, loggers={}))
    assert_equal(encoder_of(again), before)


# Composer wonders that an epoch has no batch left after a checkpoint at its last one.
@pytest.mark.filterwarnings("ignore:No batches were trained")
@pytest.mark.parametrize(
    ("save_interval", "last"),
    [("3ba", 5), ("3ba", 7), ("4ba", 5), ("1ep", 5)],
    ids=["in mid-epoch", "in the second epoch", "at an epoch's last batch", "between epochs"],
)
def test_an_interrupted_run_continues_as_if_it_had_not_been(
    save_interval: str,
    last: int,
    images: Path,
    tmp_path: Path,
    finished: tuple[Recipe, Outputs],
) -> None:
    """Four batches an epoch: the same images, crops and masks, wherever the checkpoint was taken."""
    recipe = recipe_in(tmp_path, images, f"save_interval={save_interval}")

    with killed_at(last):
        pretrain(recipe)
    assert_equal(encoder_of(pretrain(recipe)), encoder_of(finished[1]))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimizer.weight_decay=0.1", "optimizer"),
        ("data.crop_scale=[0.1, 1.0]", "data.crop_scale"),
        ("algorithms.aemim.steps=3", "algorithms"),
        ("autoresume=false", "holds a run already"),
    ],
)
def test_another_recipe_does_not_continue_a_run(
    finished: tuple[Recipe, Outputs], images: Path, tmp_path: Path, override: str, named: str
) -> None:
    other = recipe_in(tmp_path, images, override)
    with pytest.raises(RecipeError, match=named):
        prepare(replace(other, save_folder=finished[0].save_folder))


def test_a_folder_with_checkpoints_only_is_not_written_over(images: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, images, "autoresume=false")
    Path(recipe.save_folder).mkdir(parents=True)
    Path(recipe.save_folder, "ep0-ba4-rank0.pt").touch()
    with pytest.raises(RecipeError, match="holds a run already"):
        prepare(recipe)


@pytest.mark.filterwarnings("ignore:FSDP2 Config/APIs are experimental")
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("precision=amp_fp16", "precision=amp_fp16"),
        ("device_train_microbatch_size=auto", "device_train_microbatch_size=auto"),
        ("parallelism={fsdp2: {data_parallel_replicate_degree: 0}}", "degree=0: expected a divisor of the 1"),
        ("parallelism={fsdp2: {data_parallel_replicate_degree: 3}}", "degree=3: expected a divisor of the 1"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused(images: Path, tmp_path: Path, override: str, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        prepare(recipe_in(tmp_path, images, override))


@pytest.mark.parametrize(
    ("model", "override", "message"),
    [
        ("maskfeat", "callbacks.reconstruction_pictures=null", "callbacks.reconstruction_pictures: .* MaskFeat"),
        ("dvae", "callbacks.reconstruction_pictures=null", "callbacks.reconstruction_pictures: .* DiscreteVAE"),
        ("dvae", "evaluate=true", "evaluate=true: .* DiscreteVAE"),
    ],
)  # fmt: skip
def test_what_would_fail_after_the_data_or_the_run_is_refused_before(
    images: Path, tmp_path: Path, model: str, override: str, message: str
) -> None:
    recipe = recipe_in(tmp_path, images, f"data.test_source={images / 'test'}", override)
    named = {"name": OTHERS[model], "image_size": 16}
    with pytest.raises(RecipeError, match=message) as caught:
        dry_run(replace(recipe, model=named, algorithms={}))
    assert "\n" not in str(caught.value)
    prepare(replace(recipe, model=named, algorithms={}, callbacks={}, evaluate=False))


OTHERS = {"maskfeat": "maskfeat_vit_tiny_patch4", "dvae": "dvae_tiny_patch4"}


def test_a_batch_that_ranks_cannot_share_is_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecipeError, match="global_batch_size=8.*3 processes"):
        prepare(recipe_in(tmp_path, images))


@pytest.mark.filterwarnings("ignore:FSDP2 Config/APIs are experimental")
def test_shards_between_cpus_are_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match=r"parallelism.fsdp2: expected null.*gloo sums the gradients"):
        prepare(recipe_in(tmp_path, images, "parallelism={fsdp2: null}"))


def test_weight_decay_spares_vectors_only(images: Path, tmp_path: Path) -> None:
    """As in MAE's recipe: tokens, which are no vectors by their shape, decay."""
    model = build_parts(recipe_in(tmp_path, images)).model()
    decayed, spared = parameter_groups(model, weight_decay=0.05)
    assert decayed["weight_decay"] == 0.05
    assert spared["weight_decay"] == 0.0
    names = {id(value): name for name, value in model.named_parameters()}
    assert {names[id(value)].rpartition(".")[2] for value in decayed["params"]} == {
        "weight", "cls_token", "mask_token"
    }  # fmt: skip
    assert all(value.ndim == 1 for value in spared["params"])
    grouped = [id(value) for value in decayed["params"] + spared["params"]]
    trained = [id(value) for value in model.parameters() if value.requires_grad]
    assert sorted(grouped) == sorted(trained)


def simmim_in(folder: Path, images: Path, name: str, *overrides: str) -> Recipe:
    """The same recipe with a small SimMIM in the place of the MAE."""
    recipe = recipe_in(folder, images, *overrides)
    return replace(recipe, model={"name": name, "image_size": 16, "mask_patch_size": 8} | SIMMIM[name])


SIMMIM: dict[str, dict[str, Any]] = {
    "simmim_vit_tiny_patch4": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    "simmim_swin_tiny_patch2_window4": {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2]},
}


@pytest.mark.parametrize(("name", "spared"), [
    ("simmim_vit_tiny_patch4", {"bias", "weight", "cls_token", "pos_embed", "mask_token"}),
    ("simmim_swin_tiny_patch2_window4", {"bias", "weight", "mask_token", "relative_position_bias_table"}),
])  # fmt: skip
def test_a_model_says_what_else_weight_decay_spares(
    images: Path, tmp_path: Path, name: str, spared: set[str]
) -> None:
    model = build_parts(simmim_in(tmp_path, images, name)).model()
    decayed, rest = parameter_groups(model, weight_decay=0.05)
    names = {id(value): name.rpartition(".")[2] for name, value in model.named_parameters()}
    assert {names[id(value)] for value in decayed["params"]} == {"weight"}
    assert {names[id(value)] for value in rest["params"]} == spared
    assert all(value.ndim == 1 for value in rest["params"] if names[id(value)] == "weight")
    assert len(decayed["params"]) + len(rest["params"]) == len(names)


@pytest.mark.parametrize("name", SIMMIM)
def test_simmim_runs_from_shards_to_scores(name: str, images: Path, tmp_path: Path) -> None:
    recipe = simmim_in(
        tmp_path,
        images,
        name,
        "evaluate=true",
        f"data.test_source={images / 'test'}",
        "callbacks.reconstruction_pictures.num_images=2",
        "schedule.milestones=[1ep]",
    )
    assert "encoder 0." in dry_run(recipe, seconds=0.01)
    outputs = pretrain(recipe)
    assert outputs.scores.keys() == {"trained", "random"}
    assert len(list(outputs.pictures.iterdir())) == 2
    encoder = build_parts(recipe).model().get_submodule("encoder")
    assert encoder_of(outputs).keys() == encoder.state_dict().keys() - {"mask_token"}
    for key, value in encoder_of(outputs).items():
        assert value.shape == encoder.state_dict()[key].shape, key


def rates_of(recipe: Recipe) -> list[float]:
    """The learning rate of each batch of a run without AEMIM."""
    logger = InMemoryLogger()
    parts = replace(build_parts(recipe), loggers=[logger], algorithms=[])
    trainer = build_trainer(recipe, parts, train_shards(recipe.data))
    trainer.fit()
    trainer.close()
    return [float(value) for _, value in logger.data["lr-AdamW/group0"]]


def test_the_rate_warms_up_and_falls_as_a_cosine(images: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, images, "callbacks.lr_monitor=null", "algorithms={aemim: null}")
    peak = learning_rate(recipe)
    assert peak == pytest.approx(0.01 * 8 / 256)
    cosine = 0.5 * peak * (1 + torch.cos(torch.pi * torch.arange(6) / 6))
    assert rates_of(recipe) == pytest.approx([0.0, peak / 2, *cosine.tolist()])


@pytest.mark.parametrize(("warmup", "rates"), [("02ba", [0.0, 0.5, 1.0]), ("00ba", [1.0, 1.0, 1.0])])
def test_leading_zeros_say_nothing(images: Path, tmp_path: Path, warmup: str, rates: list[float]) -> None:
    overrides = ("callbacks.lr_monitor=null", "max_duration=4ba", f"schedule.warmup={warmup}")
    recipe = recipe_in(tmp_path, images, *overrides, "schedule.milestones=[3ba]")
    assert rates_of(recipe)[:3] == pytest.approx([learning_rate(recipe) * rate for rate in rates])


@pytest.mark.parametrize("warmup", [0, 2])
def test_the_rate_can_fall_in_steps(images: Path, tmp_path: Path, warmup: int) -> None:
    recipe = recipe_in(
        tmp_path,
        images,
        "callbacks.lr_monitor=null",
        "max_duration=8ba",
        f"schedule.warmup={warmup}ba",
        "schedule={milestones: [4ba, 6ba], step_factor: 0.5}",
    )
    steps = [0.0, 0.5, 1.0, 1.0] if warmup else [1.0] * 4
    peak = learning_rate(recipe)
    assert rates_of(recipe) == pytest.approx([peak * step for step in [*steps, 0.5, 0.5, 0.25, 0.25]])


def test_a_loss_that_is_not_finite_ends_the_run(images: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, images, "optimizer.base_learning_rate=1e30", "schedule.warmup=1ba")
    with pytest.raises(FloatingPointError, match="batch [0-9]+"):
        pretrain(replace(recipe, algorithms={}))
    assert not (Path(recipe.save_folder) / "encoder.pt").exists()


def test_two_processes_train_one_model(images: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, images)
    overrides = [f"data.source={recipe.data.source}", f"data.cache={tmp_path / 'cache'}"]
    command = [
        *("-m", "composer.cli.launcher", "-n", "2", "--module", "aemim_algorithm"),
        *("pretrain", str(tmp_path / "tiny.yaml"), *overrides, f"save_folder={tmp_path}/run"),
    ]
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "run/encoder.pt") in done.stdout
    state = torch.load(tmp_path / "run/encoder.pt", weights_only=True)
    assert state["patch_embed.proj.weight"].shape == (32, 3, 4, 4)


def saved(outputs: Outputs) -> list[str]:
    return sorted(path.name for path in outputs.checkpoint.parent.glob("*-rank0.pt"))


def test_a_damaged_checkpoint_costs_the_batches_since_the_one_before(
    images: Path, tmp_path: Path, finished: tuple[Recipe, Outputs]
) -> None:
    recipe = recipe_in(tmp_path, images, "save_interval=3ba")
    first = pretrain(recipe)
    assert saved(first) == [*(f"ep{n}-rank0.pt" for n in ("0-ba3", "1-ba6", "2-ba8")), "latest-rank0.pt"]
    for name in ("ep2-ba8-rank0.pt", "ep1-ba6-rank0.pt"):
        path = Path(recipe.save_folder, name)
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="damaged.*continues from ep0-ba3-rank0.pt"):
        again = pretrain(recipe)
    assert_equal(encoder_of(again), encoder_of(finished[1]))
    for path in Path(recipe.save_folder).glob("ep*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 3 checkpoints can be read"):
        pretrain(recipe)


def test_as_many_checkpoints_are_kept_as_the_recipe_says(images: Path, tmp_path: Path) -> None:
    outputs = pretrain(recipe_in(tmp_path, images, "save_interval=1ba", "keep_checkpoints=2"))
    assert saved(outputs) == ["ep1-ba7-rank0.pt", "ep1-ba8-rank0.pt", "latest-rank0.pt"]
    for bad in ("keep_checkpoints=1", "dist_timeout=0", "on_nonfinite=ignore"):
        with pytest.raises(RecipeError, match=bad.partition("=")[0]):
            recipe_in(tmp_path, images, bad)


@pytest.mark.filterwarnings("ignore:batch .*skipped")
def test_a_recipe_can_skip_batches_up_to_ten_in_a_row(images: Path, tmp_path: Path) -> None:
    overrides = ("optimizer.base_learning_rate=1e30", "schedule.warmup=1ba", "on_nonfinite=skip")
    recipe = replace(recipe_in(tmp_path, images, *overrides, "max_duration=20ba"), algorithms={})
    with pytest.raises(FloatingPointError, match="after 10 batches in a row were skipped"):
        pretrain(recipe)


def test_a_full_disk_ends_the_command_with_one_line_and_code_1(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_in(tmp_path, images, "save_interval=3ba")
    overrides = [f"data.source={images / 'train'}", f"data.cache={images / 'cache'}", "save_interval=3ba"]
    command = [
        "aemim",
        "pretrain",
        str(tmp_path / "tiny.yaml"),
        *overrides,
        f"save_folder={tmp_path / 'run'}",
    ]
    monkeypatch.setattr("sys.argv", command)
    size = (
        pretrain(replace(recipe, max_duration="3ba", save_folder=str(tmp_path / "other")))
        .checkpoint.stat()
        .st_size
    )
    with small_files(size // 2), pytest.raises(SystemExit, match="1"):
        main()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "aemim:" in line]
    assert "a checkpoint could not be written" in line
    assert not [
        path for path in (tmp_path / "run").iterdir() if path.suffix not in (".yaml", ".json", ".jsonl")
    ]
    with pytest.raises(SystemExit, match="0"):
        main()
    assert (tmp_path / "run" / "encoder.pt").exists()
