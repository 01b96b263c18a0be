"""`aemim probe`: its scores, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import small_files, tiny_mae
from torch import Tensor
from torchvision.io import encode_png

from aemim_algorithm.cli import main
from aemim_algorithm.data.shards import write_shards
from aemim_algorithm.evaluation import evaluate_encoders
from aemim_algorithm.evaluation.frozen import encode
from aemim_algorithm.export import export_encoder
from aemim_algorithm.recipes import probe as module
from aemim_algorithm.recipes.layers import RecipeError
from aemim_algorithm.recipes.probe import run_probe
from aemim_algorithm.recipes.probe_schema import ProbeRecipe, load_probe

MODEL = "{name: mae_vit_tiny_patch4, image_size: 16, embed_dim: 24, depth: 2, num_heads: 2, decoder_dim: 16, decoder_depth: 1, decoder_heads: 2}"


def shards(folder: Path, count: int, seed: int, *, moved: int = 0) -> Path:
    """Images whose class is a colour under much noise; with ``moved``, named otherwise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = torch.rand(count, 3, 16, 16, generator=generator) * 150
    tint = torch.randn(count, 3, 1, 1, generator=generator) * 12
    images = (noise + tint + (torch.eye(3)[labels] * 25 + 50)[:, :, None, None]).clamp(0, 255).to(torch.uint8)
    labels = (labels + moved) % 3
    samples = [(encode_png(image).numpy().tobytes(), int(y)) for image, y in zip(images, labels, strict=True)]
    write_shards(samples, folder, classes=("red", "green", "blue"), made_from={})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    return shards(folder / "train", 90, seed=0), shards(folder / "test", 45, seed=1)


@pytest.fixture
def encoder(tmp_path: Path, data: tuple[Path, Path]) -> Path:
    """A run's encoder.pt, with the recipe beside it."""
    run = tmp_path / "run"
    run.mkdir()
    export_encoder(tiny_mae().state_dict(), run / "encoder.pt", format="timm")
    sources = f"{{source: {data[0]}, test_source: {data[1]}, cache: {tmp_path / 'cache'}, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}}"
    (run / "recipe.yaml").write_text(f"run_name: run\nmodel: {MODEL}\ndata: {sources}\n")
    return run / "encoder.pt"


def recipe_of(encoder: Path, *overrides: str) -> ProbeRecipe:
    return load_probe(None, [f"encoder={encoder}", "device=cpu", "mae.batch_size=64", *overrides])


def test_scores_are_those_of_the_encoder_of_that_run(encoder: Path, data: tuple[Path, Path]) -> None:
    outputs = run_probe(recipe_of(encoder), command=["aemim", "probe", "x"])
    expected = evaluate_encoders(
        {"it": tiny_mae().encoder}, *data, image_size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
    )["it"]
    rows = {row["metric"]: row for row in outputs.results}
    assert list(rows) == ["knn", "logistic", "mae"]
    assert rows["knn"]["value"] == pytest.approx(expected["knn"])
    assert rows["logistic"]["value"] == pytest.approx(expected["linear"])
    assert 45 < expected["knn"] < 100
    for row in rows.values():
        assert row["n"] == 45
        assert row["low"] < row["value"] < row["high"]
        assert row["value"] == pytest.approx(100 * row["correct"] / 45)
    assert outputs.out == encoder.parent / "probe.json"
    written = json.loads(outputs.out.read_text())
    assert written["results"] == outputs.results
    assert (written["n_train"], written["dim"], written["command"]) == (90, 24, "aemim probe x")
    assert "torch" in written["versions"]


def test_a_second_probe_reads_the_features(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_probe(recipe_of(encoder))
    assert not first.cached
    calls = []

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(args[1])
        return encode(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "encode", counted)
    again = run_probe(recipe_of(encoder, "methods=[knn]", "knn.k=20"))
    assert (again.cached, calls) == (True, [])
    assert again.results == first.results[:1]
    # Whatever decides the features makes others.
    for changed in ("pooling=class", "precision=float16", "data.mean=[0.4,0.5,0.5]"):
        assert not run_probe(recipe_of(encoder, "methods=[knn]", changed)).cached
    assert len(calls) == 6
    export_encoder(tiny_mae(seed=1).state_dict(), encoder, format="timm")
    assert not run_probe(recipe_of(encoder, "methods=[knn]")).cached


def test_another_architecture_of_the_same_weights_has_its_own_features(encoder: Path) -> None:
    """The number of heads is in no tensor's shape."""
    other = encoder.parent / "other.yaml"
    other.write_text(f"model: {MODEL}".replace("num_heads: 2", "num_heads: 4"))
    run_probe(recipe_of(encoder, "methods=[knn]"))
    assert not run_probe(recipe_of(encoder, "methods=[knn]", f"model={other}")).cached
    assert run_probe(recipe_of(encoder, "methods=[knn]", f"model={other}")).cached
    kept = [torch.load(path, weights_only=True)["features"] for path in encoder.parent.rglob("test-*.pt")]
    assert (kept[0] - kept[1]).abs().max() > 1e-3


def foreign(folder: Path, *, moved: int) -> bytes:
    """Shards whose index has no hashes, as others write them, and no names of classes."""
    shards(folder, 45, seed=1, moved=moved)
    (folder / "conversion.json").unlink()
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        shard["raw_data"]["hashes"] = {}
    (folder / "index.json").write_text(json.dumps(index))
    return (folder / "index.json").read_bytes()


def test_relabelled_shards_without_hashes_are_read_again(encoder: Path, tmp_path: Path) -> None:
    place = tmp_path / "foreign"
    before = foreign(place, moved=0)
    probed = recipe_of(encoder, "methods=[knn]", f"data.test_source={place}")
    first = run_probe(probed)
    assert run_probe(probed).cached
    shutil.rmtree(place)
    assert foreign(place, moved=1) == before
    again = run_probe(probed)
    assert not again.cached
    assert again.results != first.results


def test_what_is_wrong_is_said_before_an_image_is_encoded(encoder: Path, tmp_path: Path) -> None:
    strange = shards(tmp_path / "strange", 45, seed=1)
    note = strange / "conversion.json"
    note.write_text(note.read_text().replace("green", "zebra"))
    for overrides, message in (
        (["knn.k=91"], "knn.k=91: expected at most 90, the training images"),
        ([f"data.test_source={strange}"], "the class 'zebra' is none of the 3"),
    ):
        with pytest.raises(ValueError, match=message):
            run_probe(recipe_of(encoder, *overrides))
    assert not (encoder.parent / "features").exists()


def test_the_class_token_is_another_feature(encoder: Path, data: tuple[Path, Path]) -> None:
    run_probe(recipe_of(encoder, "methods=[knn]", "pooling=class"))
    (path,) = (encoder.parent / "features").glob("test-*.pt")
    kept: Tensor = torch.load(path, weights_only=True)["features"]
    options = {"image_size": 16, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    average = encode({"it": tiny_mae().encoder}, data[1], **options)[0]["it"]  # type: ignore[arg-type]
    first = encode({"it": tiny_mae().encoder}, data[1], pooling="class", **options)[0]["it"]  # type: ignore[arg-type]
    torch.testing.assert_close(kept, first)
    assert (kept - average).abs().mean() > 0.1


def test_half_precision_changes_little(encoder: Path) -> None:
    values = [
        [row["value"] for row in run_probe(recipe_of(encoder, f"precision={precision}")).results]
        for precision in ("float32", "float16")
    ]
    assert values[0] == pytest.approx(values[1], abs=2.3)  # one of 45 images


def test_damaged_features_are_computed_again(encoder: Path) -> None:
    first = run_probe(recipe_of(encoder, "methods=[knn]"))
    for path in (encoder.parent / "features").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="cannot be used .*; the features are computed again"):
        again = run_probe(recipe_of(encoder, "methods=[knn]"))
    assert (again.cached, again.results) == (False, first.results)
    assert run_probe(recipe_of(encoder, "methods=[knn]")).cached


def test_a_full_disk_leaves_nothing(encoder: Path) -> None:
    with small_files(4096), pytest.raises(OSError, match="File too large"):
        run_probe(recipe_of(encoder))
    assert not [
        path
        for path in encoder.parent.rglob("*")
        if path.name not in {"encoder.pt", "recipe.yaml", "features"}
    ]


def test_the_command_says_what_it_found(
    encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "probe.yaml"
    path.write_text("methods: [knn]\ndevice: cpu\n")
    monkeypatch.setattr("sys.argv", ["aemim", "probe", str(path), f"encoder={encoder}"])
    with pytest.raises(SystemExit, match="0"):
        main()
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["top-1,", "%", "value", "95%", "interval", "n"]
    assert said[1].split()[0] == "knn"
    assert said[1].split()[-1] == "45"
    assert "computed" in said[2]
    assert "no augmentation" in said[2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoder=nowhere.pt"], "encoder=nowhere.pt: no such file; expected the encoder.pt of a run"),
        (["metods=[knn]"], "did you mean 'methods'"),
        (["methods=[nkn]"], "methods=nkn: did you mean 'knn'"),
        (["methods=[]"], r"methods=\[\]: known: knn, logistic, mae"),
        (
            ["data.source=s3://bucket/x", "data.test_source=photos"],
            "data.source=s3://bucket/x: expected photos, an",
        ),
        (["data.source=nowhere", "data.test_source=photos"], "data.source=nowhere: expected photos"),
        (["pooling=max"], "pooling"),
        (["knn.k=0"], "knn.k=0: expected at least 1"),
        (["knn.temperature=0"], "knn.temperature=0.0: expected above 0"),
        (["logistic.weight_decay=0"], "logistic.weight_decay=0.0: expected above 0"),
        (["mae.epochs=5"], "mae.warmup_epochs=10: expected fewer than the 5 epochs"),
        (["data.source=photos/train"], "data.test_source: expected labelled images: none goes with"),
    ],
)
def test_a_wrong_recipe_is_one_line(overrides: list[str], message: str, encoder: Path) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        recipe_of(encoder, *overrides)
    assert "\n" not in str(raised.value)


def test_an_encoder_of_another_architecture_is_one_line(encoder: Path) -> None:
    with pytest.raises(ValueError, match=r"does not fit .*: got .*, expected"):
        run_probe(recipe_of(encoder, "model=mae_vit_tiny_patch4"))


def test_without_a_recipe_beside_it_all_must_be_said(encoder: Path, data: tuple[Path, Path]) -> None:
    recipe = encoder.parent / "recipe.yaml"
    named = recipe.rename(encoder.parent / "other.yaml")
    with pytest.raises(RecipeError, match="image_size: expected the side of the images"):
        recipe_of(encoder)
    with pytest.raises(RecipeError, match=r"data.source: expected labelled images"):
        recipe_of(encoder, "image_size=16")
    places = [f"data.source={data[0]}", f"data.test_source={data[1]}", "image_size=16", "methods=[knn]"]
    with pytest.raises(RecipeError, match=r"name its architecture as model=…"):
        run_probe(recipe_of(encoder, *places))
    assert run_probe(recipe_of(encoder, *places, f"model={named}")).results[0]["n"] == 45


def test_a_checkpoint_is_no_encoder(encoder: Path) -> None:
    torch.save({"state": Path("x")}, encoder)
    with pytest.raises(ValueError, match=r"is no encoder.pt: write one with `aemim export` first"):
        run_probe(recipe_of(encoder))
