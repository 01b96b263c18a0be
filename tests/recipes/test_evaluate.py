"""`aemim evaluate` end to end, on hand-made sets and a tiny classifier."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hand_made import write_grey
from typer.testing import CliRunner

from aemim_algorithm.classifier import save_classifier
from aemim_algorithm.cli import app
from aemim_algorithm.environment import write_json
from aemim_algorithm.evaluation.classifiers import load_classifier
from aemim_algorithm.evaluation.imagenet_classes import imagenet_synsets
from aemim_algorithm.evaluation.suite import evaluate_sets, open_sets
from aemim_algorithm.recipes.evaluate import evaluate
from aemim_algorithm.recipes.evaluate_schema import load_evaluate_recipe
from aemim_algorithm.recipes.layers import RecipeError

YAMLS = Path(__file__).parents[2] / "yamls" / "evaluate"
SYNSETS = imagenet_synsets()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A classifier of two classes on 32 pixels, its test set, and a recipe of both."""
    kwargs = {"num_classes": 2, "img_size": 32}
    torch.manual_seed(0)
    save_classifier(
        tmp_path / "run" / "classifier.pt",
        state=timm.create_model("test_vit", **kwargs).state_dict(),
        architecture={"name": "test_vit", "kwargs": kwargs},
        image_size=32,
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        classes=("dog", "cat"),
        crop_fraction=1.0,
    )
    write_grey(
        tmp_path / "test", {f"{'cat' if i % 3 else 'dog'}/{i}.png": 20 * i for i in range(12)}, size=32
    )
    (tmp_path / "own.yaml").write_text(
        f"classifier: {tmp_path}/run/classifier.pt\nsets: {{clean: {tmp_path}/test}}\n"
        f"out: {tmp_path}/out\nbatch_size: 5\nworkers: 0\ndevice: cpu\n"
    )
    return tmp_path


def _evaluate(recipe: Path, *overrides: str) -> dict[str, Any]:
    return evaluate(load_evaluate_recipe(recipe, overrides), command=["aemim", "evaluate", str(recipe)])


def test_results_carry_what_a_number_needs(own: Path) -> None:
    report = _evaluate(own / "own.yaml")
    assert json.loads((own / "out" / "results.json").read_text()) == json.loads(json.dumps(report))
    opened = open_sets(load_classifier(own / "run"), {"clean": str(own / "test")})
    assert report["results"] == evaluate_sets(opened)[0]
    assert report["results"][0]["n"] == 12
    assert report["command"] == f"aemim evaluate {own}/own.yaml"
    assert set(report) >= {"date", "hardware", "versions", "seeds", "device", "preprocessing"}
    assert report["timing"]["clean"]["images"] == 12
    assert 0 <= report["timing"]["clean"]["share_waiting"] <= 1
    assert report["skipped"]["sketch"] == "not given"
    assert (report["complete"], report["unfinished"]) == (True, [])
    digest = hashlib.sha256((own / "run" / "classifier.pt").read_bytes()).hexdigest()
    assert report["classifier"]["sha256"] == digest
    assert "**Not evaluated:** imagenet (not given)" in (own / "out" / "results.md").read_text()
    assert sorted(path.name for path in (own / "out").iterdir()) == ["results.json", "results.md"]


def test_a_detector_from_the_same_encoder_is_shown_with_the_rest(own: Path) -> None:
    scores = {"AP": 41.25}
    detection = {"run": "detector", "encoder": "encoder.pt", "data": "val", "images": 9, "trained": "trained"}
    write_json(detection | {"box": scores, "mask": scores}, own / "detector" / "results.json")
    report = _evaluate(own / "own.yaml", f"detection={own}/detector/results.json")
    assert report["detection"] == detection | {"box": scores, "mask": scores}
    text = (own / "out" / "results.md").read_text()
    assert "| – | **detector** | – | **41.2** | **41.2** |" in text
    with pytest.raises(ValueError, match=r"detection=.*out/results.json: expected the results.json of a run"):
        _evaluate(own / "own.yaml", f"detection={own}/out/results.json", f"out={own}/other")
    assert not (own / "other").exists()


def test_corruptions_and_attacks_are_tables_and_plots(own: Path) -> None:
    (own / "ids.txt").write_text("cat/1.png\ncat/4.png\n5.png\n")
    report = _evaluate(
        own / "own.yaml",
        "corruptions={table: cifar, severities: [2, 4], corruptions: [contrast, gaussian_noise], seed: 3}",
        f"attacks={{fgsm: [0, 8], pgd: {{steps: 2, epsilons: [8]}}, images: {own}/ids.txt}}",
    )
    cells = report["corruptions"]["accuracy"]
    assert {name: sorted(row) for name, row in cells.items()} == {
        "contrast": ["2", "4"],
        "gaussian_noise": ["2", "4"],
    }
    attacked = [row for row in report["results"] if "attack" in row]
    assert [(row["attack"], row["epsilon"], row["n"]) for row in attacked] == [
        ("fgsm", 0.0, 3),
        ("fgsm", 8.0, 3),
        ("pgd", 8.0, 3),
    ]
    assert attacked[0]["value"] >= attacked[1]["value"]
    assert report["seeds"] == {"corruptions": 3, "attacks": 17}
    assert "3 images that ids.txt names" in report["attacks"]["images"]
    text = (own / "out" / "results.md").read_text()
    assert "## Under attack, on clean" in text
    assert "| contrast |" in text
    assert "## Corruptions made on the fly, of clean" in text
    assert {"clean", "corruptions", "attacks"} == set(report["timing"])
    assert report["attacks"]["precision"] == "fp32"
    assert (own / "out" / "attacks.png").stat().st_size > 10_000
    assert (own / "out" / "corruptions.png").stat().st_size > 10_000
    again = _evaluate(
        own / "own.yaml",
        "corruptions={table: cifar, severities: [2, 4], corruptions: [contrast, gaussian_noise], seed: 3, "
        f"relative_to: {own}/out/results.json}}",
        f"out={own}/again",
    )
    assert again["corruptions"]["accuracy"]["contrast"]["2"]["value"] == cells["contrast"]["2"]["value"]
    assert again["corruptions"]["relative_to_baseline"]["mean"] == pytest.approx(100.0)
    with pytest.raises(ValueError, match="corruptions.relative_to=.*: its seed is 3, expected 4"):
        _evaluate(
            own / "own.yaml",
            "corruptions={table: cifar, severities: [2, 4], corruptions: [contrast, gaussian_noise], seed: 4, "
            f"relative_to: {own}/out/results.json}}",
            f"out={own}/refused",
        )
    assert not (own / "refused").exists()
    _evaluate(own / "own.yaml")  # without them: their plots were of another evaluation
    assert sorted(path.name for path in (own / "out").iterdir()) == ["results.json", "results.md"]


def test_imagenets_sets_in_one_report(tmp_path: Path) -> None:
    val = write_grey(tmp_path / "val", {f"{SYNSETS[i]}/ILSVRC2012_val_{i:08d}.JPEG": i for i in range(1, 5)})
    v2 = write_grey(tmp_path / "v2", {f"{i}/x.png": i for i in (0, 10, 2)})
    a = write_grey(tmp_path / "a", {f"{SYNSETS[6]}/x.png": 6})
    (tmp_path / "in.yaml").write_text(
        f"bases: [{YAMLS}/imagenet.yaml]\nclassifier: timm:test_vit\nweights: random\nattacks: null\nworkers: 0\n"
        f"out: {tmp_path}/out\ndevice: cpu\nsets: {{imagenet: {val}, v2: {v2}, a: {a}, r: {tmp_path}/none}}\n"
    )
    report = _evaluate(tmp_path / "in.yaml")
    counts = {row["set"]: row["n"] for row in report["results"] if row["metric"] == "top1"}
    assert counts == {"imagenet": 4, "real": 3, "v2": 3, "a": 1}
    assert set(report["timing"]) == {"imagenet+real", "v2", "a"}
    assert report["skipped"]["r"] == f"{tmp_path}/none does not exist"
    text = (tmp_path / "out" / "results.md").read_text()
    assert "4 of 50,000" in text
    assert "Not to be compared with the paper: ImageNet (4 of 50,000 images), ImageNet-Real (3 of" in text
    assert "| ViT-B | AEMIM | 800 | 6.1 | 83.8 | 88.5 | 74.0 |" in text


def test_imagenet_c_needs_imagenets_classes(own: Path) -> None:
    (own / "c" / "fog" / "1" / "n01440764").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"sets.c: .* lacks 1000 of ImageNet's"):
        _evaluate(own / "own.yaml", f"sets.c={own}/c")


def test_an_interrupted_run_leaves_nothing_half_written(own: Path) -> None:
    (own / "test" / "cat" / "7.png").write_bytes(b"\x89PNG no picture")
    with pytest.raises(ValueError, match=r"cat/7.png: image: "):
        _evaluate(own / "own.yaml")
    assert not (own / "out").exists()


def test_what_was_measured_before_an_interruption_is_kept_and_marked(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("aemim_algorithm.recipes.evaluate.robust_accuracy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _evaluate(
            own / "own.yaml",
            "corruptions={table: cifar, severities: [1], corruptions: [contrast]}",
            "attacks={fgsm: [1]}",
        )
    kept = json.loads((own / "out" / "results.json").read_text())
    assert (kept["complete"], kept["unfinished"]) == (False, ["attacks"])
    assert kept["results"][0]["n"] == 12
    assert kept["corruptions"]["accuracy"]["contrast"]["1"]["n"] == 12
    assert "**Incomplete:** attacks" in (own / "out" / "results.md").read_text()


def test_imagenet_c_with_a_foreign_class_is_refused_before_anything_runs(tmp_path: Path) -> None:
    val = write_grey(tmp_path / "val", {f"{SYNSETS[1]}/1.png": 1})
    write_grey(tmp_path / "c" / "fog" / "1", {f"{SYNSETS[1]}/1.png": 1})
    write_grey(tmp_path / "c" / "fog" / "2", {"tench/1.png": 1})
    (tmp_path / "in.yaml").write_text(
        f"classifier: timm:test_vit\nweights: random\nworkers: 0\nout: {tmp_path}/out\ndevice: cpu\n"
        f"sets: {{imagenet: {val}, c: {tmp_path}/c}}\n"
    )
    with pytest.raises(ValueError, match="'tench'"):
        _evaluate(tmp_path / "in.yaml")
    assert not (tmp_path / "out").exists()


def test_a_number_that_json_lacks_leaves_the_old_file(tmp_path: Path) -> None:
    write_json({"value": 1}, tmp_path / "results.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"value": float("nan")}, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == {"value": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_tar_and_shards_give_the_same_results(own: Path) -> None:
    from aemim_algorithm.data.convert import convert

    convert(own / "test", own / "shards", progress=False)
    one, two = (
        _evaluate(own / "own.yaml", f"sets.clean={own}/{name}")["results"] for name in ("test", "shards")
    )
    assert one == two


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["sets.imagnet=x"], "unknown key 'sets.imagnet'; did you mean 'imagenet'"),
        (["sets.clean=null"], "there is nothing to evaluate on: no set is given"),
        (["sets.clean=nowhere"], "there is nothing to evaluate on: sets.clean: nowhere does not exist"),
        (["attacks={fgsm: [-1]}"], r"attacks.fgsm=-1.0 is out of range: .* \(1/255 of the pixel range\)"),
        (["attacks={images: ids.txt}"], "attacks: expected budgets as fgsm"),
        (["corruptions={}"], "corruptions.table has no value"),
        (["corruptions={table: cifar, severities: [6]}"], "corruptions.severities='6' is unknown"),
        (["corruptions={table: cifar, corruptions: [fogg]}"], "'fogg' is unknown; did you mean 'fog'"),
        (
            ["corruptions={table: cifar, relative_to: none.json}"],
            "relative_to=none.json: expected the results.json",
        ),
        (["attacks={fgsm: [1], images: none.txt}"], "none.txt is not readable as a list of image names"),
        (["images=none.txt"], "none.txt is not readable as a list of image names"),
        (["published=nowhere"], "published=nowhere: expected a clone of pytorch-image-models"),
        (["classifier=nowhere"], "classifier 'nowhere' does not exist"),
        (["weights=random"], "only a classifier timm:NAME takes them"),
        (["batch_size=0"], "batch_size=0 is out of range"),
        (["attacks={fgsm: [1], seed: 2147483648}"], "attacks.seed=2147483648 is out of range"),
        (["attacks={pgd: {epsilons: []}}"], "attacks.pgd.epsilons=\\[\\]: expected"),
        (["attacks={fgsm: [1, 1.0]}"], "attacks.fgsm=.*: expected each budget once"),
        (["attacks={pgd: {epsilons: [2, 2]}}"], "attacks.pgd.epsilons=.*: expected each budget once"),
    ],
)
def test_what_cannot_be_run_is_one_line_before_it_runs(own: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        _evaluate(own / "own.yaml", *overrides)
    assert "\n" not in str(error.value)
    assert not (own / "out").exists()


@pytest.mark.parametrize("name", sorted(path.stem for path in YAMLS.glob("*.yaml")))
def test_the_recipes_that_ship_are_valid(name: str) -> None:
    recipe = load_evaluate_recipe(YAMLS / f"{name}.yaml")
    assert recipe.attacks is not None
    assert recipe.attacks.fgsm == [0, 1, 2, 4, 8]
    assert recipe.attacks.pgd is not None
    assert 0.51 in recipe.attacks.pgd.epsilons  # 0.002 of the pixel range, of Figure 3
    assert recipe.run_name == name


def test_the_command_prints_the_table_and_names_the_recipe(own: Path) -> None:
    done = CliRunner().invoke(app, ["evaluate", str(own / "own.yaml")])
    assert done.exit_code == 0, done.output
    assert "| clean | top1 |" in done.output
    failed = CliRunner().invoke(app, ["evaluate", str(own / "own.yaml"), "sets.clean=nowhere"])
    assert isinstance(failed.exception, RecipeError)
    assert str(failed.exception).startswith(f"{own / 'own.yaml'}: there is nothing to evaluate on")
