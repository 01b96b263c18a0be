"""The command line: what it prints, how it ends, and that a wrong recipe costs nothing."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.io import write_png

from aemim_algorithm import cli
from aemim_algorithm.models import MAE
from aemim_algorithm.recipes import datasets
from aemim_algorithm.recipes.schema import load_recipe

RECIPE = """
model: {name: mae_vit_tiny_patch4, image_size: 16, embed_dim: 32, depth: 1, num_heads: 2}
data: {source: photos, crop_scale: [0.5, 1.0]}
algorithms: {aemim: }
optimizer: {base_learning_rate: 0.01, weight_decay: 0.05, betas: [0.9, 0.95]}
schedule: {warmup: 1ba, min_learning_rate: 0.0}
max_duration: 2ba
global_batch_size: 4
device: cpu
"""

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def aemim(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aemim", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(8):
        picture = tmp_path / "images" / str(number % 2) / f"{number}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        write_png(torch.full((3, 20, 20), 30 * number, dtype=torch.uint8), str(picture))
    return tmp_path / "images"


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    # The signature stays, as options are checked against it.
    @functools.wraps(MAE.__init__)
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("data was read or a model was built")

    monkeypatch.setattr(datasets, "convert", refuse)
    monkeypatch.setattr(datasets, "write_photos", refuse)
    monkeypatch.setattr(MAE, "__init__", refuse)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.mask_ratio=1.5", "model: mask_ratio=1.5 leaves"),
        ("model.embed_dim=33", "model: "),
        ("model.image_size=15", "model: "),
        ("model.num_heads=0", "model: "),
        ("model.decoder_heads=0", "model: "),
        ("model.patch_size=0", "model: "),
        ("algorithms.aemim.encoder=foo", "encoder='foo' names nothing in MAE"),
        ("seed=-1", "seed=-1: expected"),
        ("save_interval=0ep", "save_interval=0ep: expected"),
        ("save_folder=s3://bucket/run", "expected a local folder"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_a_model_that_cannot_be_is_refused_before_data_is_read(
    aemim: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch, override: str, said: str, dry: bool
) -> None:
    monkeypatch.setattr(datasets, "write_photos", lambda _: pytest.fail("data was read"))
    code, out, err = aemim("pretrain", recipe, override, *(["--dry-run"] if dry else []))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert said in err
    assert list(recipe.parent.iterdir()) == [recipe]


def test_files_left_out_are_counted_and_named(aemim: Command, recipe: Path, images: Path) -> None:
    (images / "0" / "broken.png").write_text("no image")
    code, out, _ = aemim("data", images, "shards", "--skip-broken")
    assert code == 0
    assert "8 images of 2 classes" in out
    assert "left out 1 files that are not images, named in shards.broken.txt" in out
    code, _, err = aemim(
        "pretrain", recipe, f"data.source={images}", "data.skip_broken=true", "data.workers=0"
    )
    assert code == 0
    assert "left out 1 files" in err


def test_a_source_that_has_changed_is_not_trained_on_as_it_was(
    aemim: Command, recipe: Path, images: Path
) -> None:
    arguments = ("pretrain", recipe, f"data.source={images}", "data.workers=0")
    assert aemim(*arguments)[0] == 0
    write_png(torch.zeros(3, 20, 20, dtype=torch.uint8), str(images / "0" / "more.png"))
    code, _, err = aemim(*arguments, "run_name=again")
    assert code == 1
    assert "is no conversion of this source with these options: remove it" in err


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimiser.betas=3", "did you mean 'optimizer'?"),
        ("max_duration=long", "max_duration=long: expected a duration"),
        ("data.source=no/such/folder", "data.source=no/such/folder: expected"),
        ("model.name=mae_vit_tiny", "did you mean 'mae_vit_tiny_patch4'?"),
        ("model.mask_ration=0.5", "did you mean 'mask_ratio'?"),
        ("model.mask_ratio=most", "mask_ratio: Value 'most'"),
        ("model.image_size=null", "model.image_size=None: expected"),
        ("algorithms.aemmi=null", "did you mean 'aemim'?"),
        ("algorithms.aemim.epsilom=3", "did you mean 'epsilon'?"),
        ("algorithms.aemim.epsilon=-1", "epsilon=-1"),
        ("algorithms.aemim.steps=1.5", "steps: Value '1.5'"),
        ("algorithms.aemim.mean=[0, 0, 0]", "algorithms.aemim.mean: set data.mean"),
        ("algorithms.gradient_clipping=null", "gradient_clipping.clipping_type has no value"),
        ("algorithms.gradient_cliping=null", "did you mean 'gradient_clipping'?"),
        ("callbacks.speed_monitor.window=3", "did you mean 'window_size'?"),
        ("callbacks.nan_monitor.interval=3", "unknown key 'interval'"),
        ("loggers.wandb=null", "did you mean 'wandb_logger'?"),
        ("parallelism.ddp=null", "known: fsdp, fsdp2"),
        ("parallelism.fsdp2.reshard=true", "did you mean 'reshard_after_forward'?"),
        ("parallelism.fsdp2.load_monolith_rank0_only=true", "leave it out"),
        ("precision=amp_fp16", "precision=amp_fp16: expected fp32 or amp_bf16"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_code_2(
    aemim: Command, recipe: Path, override: str, said: str
) -> None:
    code, out, err = aemim("pretrain", recipe, override)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert said in err
    assert str(recipe) in err or override in err
    assert list(recipe.parent.iterdir()) == [recipe]


def test_a_recipe_that_is_not_there_is_one_line_and_code_2(aemim: Command, tmp_path: Path) -> None:
    code, _, err = aemim("pretrain", tmp_path / "gone.yaml")
    assert code == 2
    assert err == f"aemim: {tmp_path / 'gone.yaml'}: no such recipe file\n"


def test_a_wrong_command_line_is_code_2(aemim: Command) -> None:
    assert aemim("pretrian")[0] == 2
    assert aemim("pretrain")[0] == 2


@pytest.mark.usefixtures("nothing_runs")
def test_a_traceback_is_there_for_whoever_asks(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AEMIM_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["aemim", "pretrain", str(recipe), "seed=x"])
    with pytest.raises(ValueError, match="seed"):
        cli.main()


@pytest.mark.usefixtures("nothing_runs")
def test_the_refusal_would_have_been_seen(aemim: Command, recipe: Path) -> None:
    assert "data was read or a model was built" in aemim("pretrain", recipe)[2]


def test_a_fault_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(AttributeError):
        cli.main()


def test_a_dry_run_says_what_a_run_would_cost(aemim: Command, recipe: Path) -> None:
    code, out, _ = aemim("pretrain", recipe, "--dry-run")
    assert code == 0
    resolved = recipe.parent / "resolved.yaml"
    resolved.write_text(out.partition("\nparameters:")[0])
    assert load_recipe(resolved, ["run_name=tiny"]) == load_recipe(recipe)
    for word in ("encoder", "decoder", "adversarial copies", "memory per device", "GFLOP", "time:"):
        assert word in out
    assert out.count("an estimate") == 2
    assert {path.name for path in recipe.parent.iterdir()} == {"tiny.yaml", "resolved.yaml"}


def test_from_images_to_an_encoder_file(aemim: Command, recipe: Path, images: Path) -> None:
    code, out, err = aemim("data", images, "shards", "--workers", "1")
    assert (code, out) == (0, "wrote shards: 8 images of 2 classes\n")
    code, out, err = aemim("pretrain", recipe, "data.source=shards", "data.workers=0")
    assert code == 0, err
    for name in ("recipe.yaml", "latest-rank0.pt", "encoder.pt"):
        path = Path("runs/tiny", name)
        assert path.exists()
        assert str(path) in out
    assert aemim("export", "runs/tiny/latest-rank0.pt", "other.pt")[0] == 0
    one, other = (torch.load(name, weights_only=True) for name in ("runs/tiny/encoder.pt", "other.pt"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def checkpoint(recipe: Path, images: Path, aemim: Command) -> Path:
    """Of a run of two batches, with its recipe beside it."""
    code, _, err = aemim("pretrain", recipe, f"data.source={images}", "data.workers=0")
    assert code == 0, err
    return Path("runs/tiny/latest-rank0.pt")


def test_export_at_another_size_and_into_other_names(aemim: Command, checkpoint: Path) -> None:
    # The recipe beside the checkpoint tells the architecture, though its data is gone.
    (checkpoint.parent / "recipe.yaml").write_text(
        (checkpoint.parent / "recipe.yaml").read_text().replace("images", "gone")
    )
    assert aemim("export", checkpoint, "e.pt", "--image-size", "24x16")[:2] == (0, "wrote e.pt: 18 tensors\n")
    assert torch.load("e.pt", weights_only=True)["pos_embed"].shape == (1, 1 + 6 * 4, 32)
    assert aemim("export", checkpoint, "mae.pth", "--format", "mae", "--decoder")[0] == 0
    assert "decoder_pred.weight" in torch.load("mae.pth", weights_only=True)["model"]
    pytest.importorskip("transformers")
    assert aemim("export", checkpoint, "hf", "--format", "huggingface", "--decoder")[0] == 0
    assert {path.name for path in Path("hf").iterdir()} == {"config.json", "model.safetensors"}


def test_export_without_a_recipe_asks_for_the_model(aemim: Command, checkpoint: Path, recipe: Path) -> None:
    lone = Path(shutil.copy(checkpoint, "lone.pt"))
    size = ("--image-size", "32")
    code, _, err = aemim("export", lone, "e.pt", *size)
    assert code == 1
    assert err.count("\n") == 1
    assert "--model with a recipe or a model's name" in err
    assert aemim("export", lone, "e.pt", *size, "--model", recipe)[0] == 0
    code, _, err = aemim("export", lone, "f.pt", *size, "--model", "mae_vit_tiny_patch4")
    assert code == 1
    assert "does not fit MaskedViT: cls_token: got (1, 1, 32), expected (1, 1, 192)" in err
    for model, said in (
        ("mae_vit_tiny", "did you mean 'mae_vit_tiny_patch4'?"),
        ("no.yaml", "no such recipe"),
    ):
        code, _, err = aemim("export", lone, "f.pt", *size, "--model", model)
        assert code == 2
        assert said in err
    code, _, err = aemim("export", lone, "f.pt", *size, "--model", "beit_vit_tiny_patch4")
    assert code == 2
    assert err.count("\n") == 1
    assert "model.tokenizer has no value: BEiT needs one; name the run's recipe.yaml instead" in err
    assert not Path("f.pt").exists()


@pytest.mark.parametrize("size", ["0", "x", "16x", "16x16x3", "-4", "½"])
def test_a_size_that_is_none_is_code_2(aemim: Command, tmp_path: Path, size: str) -> None:
    code, _, err = aemim("export", tmp_path / "c.pt", "e.pt", f"--image-size={size}")
    assert code == 2
    assert "expected pixels, such as 384 or 384x224" in " ".join(err.replace("│", " ").split())


def test_what_was_exported_can_be_imported(aemim: Command, checkpoint: Path) -> None:
    for decoder in (True, False):
        flags = ["--decoder"] if decoder else []
        assert aemim("export", checkpoint, "mae.pth", "--format", "mae", *flags)[0] == 0
        code, out, err = aemim("import", "mae.pth", "start.pt", "--model", checkpoint.parent / "recipe.yaml")
        assert code == 0, err
        assert ("keeps its decoder's initialisation" in out) != decoder
    code, _, err = aemim("import", "mae.pth", "other.pt", "--model", "mae_vit_tiny_patch4")
    assert code == 1
    assert err.count("\n") == 1
    assert "cls_token: got (1, 1, 32), expected (1, 1, 192)" in err
    assert not Path("other.pt").exists()


def test_a_run_is_the_start_of_another(aemim: Command, checkpoint: Path, recipe: Path, images: Path) -> None:
    arguments = ("pretrain", recipe, f"data.source={images}", "data.workers=0", "run_name=second")
    code, _, err = aemim(*arguments, f"init_from={checkpoint}")
    assert code == 2
    assert "is no starting point: run `aemim import` first" in err
    imported = ("import", checkpoint, "start.pt", "--model", checkpoint.parent / "recipe.yaml")
    code, _, err = aemim(*imported)
    assert code == 1
    assert "allow it with --trust" in err
    assert aemim(*imported, "--trust")[0] == 0
    code, _, err = aemim(*arguments, "init_from=start.pt")
    assert code == 0, err


def test_a_run_that_fails_is_one_line_and_code_1(aemim: Command, recipe: Path, images: Path) -> None:
    (images / "0" / "broken.png").write_text("no image")
    code, _, err = aemim("pretrain", recipe, f"data.source={images}", "data.workers=0")
    assert code == 1
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("aemim: ")
    assert "broken" in err.splitlines()[-1]
    assert not Path("runs").exists()


def test_a_checkpoint_that_is_none_is_one_line_and_code_1(aemim: Command, recipe: Path) -> None:
    code, out, err = aemim("export", recipe, "encoder.pt")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert not Path("encoder.pt").exists()
