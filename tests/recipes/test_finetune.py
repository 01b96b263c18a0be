"""A recipe from an encoder and an image folder to a tested classifier: what it writes, resumes and refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Precision
from composer.loggers import InMemoryLogger
from ranks import run_script
from small_runs import killed_at, write_images
from torch import Tensor
from torchvision.io import write_png

from aemim_algorithm.callbacks.history import read_history
from aemim_algorithm.classifier import read_classifier
from aemim_algorithm.cli import main
from aemim_algorithm.data.streaming import train_data
from aemim_algorithm.evaluation.image_sets import open_images
from aemim_algorithm.models import MODELS
from aemim_algorithm.recipes import datasets
from aemim_algorithm.recipes.dry_run import dry_run
from aemim_algorithm.recipes.final_accuracy import final_accuracy
from aemim_algorithm.recipes.finetune import (
    FineTuned,
    build_finetuning,
    finetune,
    test_images,
)
from aemim_algorithm.recipes.finetune_preflight import classes_of, prepare_finetuning
from aemim_algorithm.recipes.schema import FineTuneRecipe, RecipeError, load_finetuning
from aemim_algorithm.recipes.training import learning_rate

TESTS = 13  # of each class: neither batches nor processes share them evenly
RECIPE = """
model:
  encoder: random
  name: mae_vit_tiny_patch4
  options: {embed_dim: 32, depth: 2, num_heads: 2}
  image_size: 16
  drop_path: 0.1
data: {crop_scale: [0.5, 1.0], workers: 0}
optimizer: {base_learning_rate: 0.05, weight_decay: 0.05, betas: [0.9, 0.999], layer_decay: 0.75}
schedule: {warmup: 2ba, min_learning_rate: 1.0e-6}
augmentation: {randaugment: rand-m9-mstd0.5-inc1, mixup: 0.8, cutmix: 1.0, label_smoothing: 0.1}
max_duration: 2ep
global_batch_size: 8
device_train_microbatch_size: 4
evaluation_crop: 1.0
device: cpu
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", per_class=16)  # four batches per epoch
    write_images(folder / "test", per_class=TESTS)
    return folder


def recipe_in(folder: Path, images: Path, *overrides: str) -> FineTuneRecipe:
    path = folder / "fine.yaml"
    path.write_text(RECIPE)
    places = [
        f"data.source={images / 'train'}",
        f"data.test_source={images / 'test'}",
        f"data.cache={images / 'cache'}",
        f"save_folder={folder / 'run'}",
    ]
    return load_finetuning(path, [*places, *overrides])


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FineTuneRecipe, FineTuned]:
    recipe = recipe_in(tmp_path_factory.mktemp("finished"), images)
    return recipe, finetune(recipe)


def folders_of(recipe: FineTuneRecipe) -> tuple[Path, Path]:
    """Of the training and the test shards, written if need be."""
    test = datasets.test_shards(recipe.data)
    assert test is not None
    return datasets.train_shards(recipe.data), test


def weights(done: FineTuned) -> dict[str, Tensor]:
    return dict(read_classifier(done.classifier).model.state_dict())


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def counted(classifier: Path, images: Path) -> tuple[int, int]:
    """Oracle: the classifier from its file, on one image at a time."""
    found = read_classifier(classifier)
    tests = open_images(images / "test", image_size=found.image_size, classes=found.classes)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (found.mean, found.std))
    with torch.no_grad():
        answers = [
            (int(found.model(((image / 255 - mean) / std)[None]).argmax()), label)
            for image, label, _ in (tests[index] for index in range(len(tests)))
        ]
    return sum(answer == label for answer, label in answers), len(answers)


def test_a_run_leaves_what_it_says(finished: tuple[FineTuneRecipe, FineTuned], images: Path) -> None:
    recipe, done = finished
    assert load_finetuning(done.recipe) == recipe
    assert read_classifier(done.classifier).classes == ("0", "1")
    assert (done.accuracy.correct, done.accuracy.n) == counted(done.classifier, images)
    assert done.accuracy.n == 2 * TESTS
    assert done.accuracy.top5 is None
    lines = [json.loads(line) for line in done.history.read_text().splitlines()]
    assert [line["batch"] for line in lines if "loss/train/total" in line] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_dark_and_bright_images_are_told_apart(finished: tuple[FineTuneRecipe, FineTuned]) -> None:
    assert finished[1].accuracy.percent > 90
    assert "95% interval" in str(finished[1].accuracy)


def test_a_finished_run_can_be_started_again(finished: tuple[FineTuneRecipe, FineTuned]) -> None:
    recipe, done = finished
    before = weights(done)
    with open(done.history, "a") as file:
        file.write('{"batch": 8, "ep')  # of a process that was killed
    again = finetune(recipe)
    assert_equal(weights(again), before)
    assert again.accuracy == done.accuracy
    scored = [line["batch"] for line in read_history(done.history.parent) if "eval" in line]
    assert scored == [4, 8]


# Composer wonders that an epoch has no batch left after a checkpoint at its last one.
@pytest.mark.filterwarnings("ignore:No batches were trained")
@pytest.mark.parametrize(
    ("save_interval", "last"), [("3ba", 7), ("1ep", 5)], ids=["in mid-epoch", "between epochs"]
)
def test_an_interrupted_run_continues_as_if_it_had_not_been(
    save_interval: str,
    last: int,
    images: Path,
    tmp_path: Path,
    finished: tuple[FineTuneRecipe, FineTuned],
) -> None:
    """Crops, RandAugment, mixing, drop path and an evaluation after the first epoch."""
    recipe = recipe_in(tmp_path, images, f"save_interval={save_interval}")

    with killed_at(last):
        finetune(recipe)
    done = finetune(recipe)
    assert_equal(weights(done), weights(finished[1]))
    assert [line["batch"] for line in read_history(done.history.parent) if "eval" in line] == [4, 8]


def test_how_often_it_is_evaluated_changes_nothing(
    images: Path, tmp_path: Path, finished: tuple[FineTuneRecipe, FineTuned]
) -> None:
    done = finetune(recipe_in(tmp_path, images, "eval_interval=3ba"))
    assert_equal(weights(done), weights(finished[1]))
    scored = [json.loads(line) for line in done.history.read_text().splitlines() if '"eval"' in line]
    assert [line["batch"] for line in scored[:2]] == [3, 6]


def test_two_processes_count_each_image_once(images: Path, tmp_path: Path) -> None:
    recipe_in(tmp_path, images)
    # Nine images a class are 18 of 26: an odd number for each, and a last batch of less than the others.
    for label in (0, 1):
        for number in range(9 - label):
            target = tmp_path / "odd" / "test" / str(label) / f"{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((images / "test" / str(label) / f"{number}.png").read_bytes())
    overrides = [
        f"data.source={images / 'train'}",
        f"data.test_source={tmp_path / 'odd' / 'test'}",
        f"data.cache={tmp_path / 'cache'}",
        f"save_folder={tmp_path / 'run'}",
        "max_duration=2ba",
        "schedule.warmup=1ba",
        "device_train_microbatch_size=2",
    ]
    run_script(Path(__file__).with_name("finetune_worker.py"), tmp_path / "fine.yaml", tmp_path, *overrides)
    expected = counted(tmp_path / "run" / "classifier.pt", tmp_path / "odd")
    assert expected[1] == 17
    for rank in (0, 1):
        assert tuple(json.loads((tmp_path / f"accuracy-{rank}.json").read_text())) == expected


def test_rates_during_training_are_the_layers_own(images: Path, tmp_path: Path) -> None:
    """Oracle: warm-up, then a cosine to the floor, times decay^(n + 1 - i), for n = 2 blocks."""
    recipe = recipe_in(tmp_path, images, "callbacks.lr_monitor=null")
    plan = prepare_finetuning(recipe)
    logger = InMemoryLogger()
    plan = replace(plan, parts=replace(plan.parts, loggers=[logger]))
    train, test = folders_of(recipe)
    names, count = classes_of(recipe, train, test)
    trainer = build_finetuning(
        recipe, plan, train, test_images(recipe, plan, test, names, count), num_classes=count
    )
    trainer.fit()
    trainer.close()
    peak, floor = learning_rate(recipe), 1e-6
    assert peak == pytest.approx(0.05 * 8 / 256)
    cosine = 0.5 * (1 + torch.cos(torch.pi * torch.arange(6) / 6))
    course = torch.cat([torch.tensor([0.0, peak / 2]), floor + (peak - floor) * cosine])
    courses = [
        [float(value) for _, value in logged]
        for name, logged in logger.data.items()
        if name.startswith("lr-")
    ]
    found = {round(course[2] / peak, 6): course for course in courses}
    assert sorted(found) == pytest.approx([0.75**3, 0.75**2, 0.75, 1.0], abs=1e-6)
    assert len(courses) == 8  # each layer once with weight decay, once without
    for scale, rates in found.items():
        assert rates == pytest.approx((course * scale).tolist(), rel=1e-4), scale


def test_the_size_of_a_micro_batch_changes_only_rounding(images: Path, tmp_path: Path) -> None:
    """Pairs that are mixed stay together; drop path, which draws per forward pass, is off."""
    losses = []
    for micro in (2, 8):
        (tmp_path / str(micro)).mkdir()
        recipe = recipe_in(
            tmp_path / str(micro),
            images,
            "model.drop_path=0.0",
            "max_duration=4ba",
            f"device_train_microbatch_size={micro}",
        )
        lines = finetune(recipe).history.read_text().splitlines()
        losses.append(
            [line["loss/train/total"] for line in map(json.loads, lines) if "loss/train/total" in line]
        )
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    "algorithms",
    [
        "{gradient_clipping: {clipping_type: norm, clipping_threshold: 1.0}, ema: {half_life: 2ba}}",
        "{label_smoothing: {target_key: label}, cut_out: {input_key: image, length: 0.3}}",
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_algorithms_of_composer_take_part(images: Path, tmp_path: Path, algorithms: str) -> None:
    mixed = "label_smoothing" not in algorithms
    others = () if mixed else ("augmentation={mixup: 0.0, cutmix: 0.0, label_smoothing: 0.0}",)
    recipe = recipe_in(tmp_path, images, f"algorithms={algorithms}", "max_duration=3ba", *others)
    done = finetune(recipe)
    assert (done.accuracy.correct, done.accuracy.n) == counted(done.classifier, images)
    trained = torch.load(done.checkpoint, weights_only=False)["state"]["model"]["network.head.weight"]
    scored = weights(done)
    assert torch.equal(trained, scored["head.weight"]) == ("ema" not in algorithms)
    assert_equal(weights(finetune(recipe)), scored)


def encoder_in(folder: Path, **sizes: int) -> Path:
    """An encoder file of a small MAE, with the recipe that a run leaves beside it."""
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "image_size": 16} | sizes
    rest = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    torch.manual_seed(1)
    encoder: Any = MODELS["mae_vit_tiny_patch4"](**options, **rest).encoder
    folder.mkdir(exist_ok=True)
    torch.save(encoder.state_dict(), folder / "encoder.pt")
    (folder / "recipe.yaml").write_text(
        "model: " + json.dumps({"name": "mae_vit_tiny_patch4"} | options | rest)
    )
    return folder / "encoder.pt"


def test_a_run_starts_from_an_encoder_and_the_recipe_beside_it(images: Path, tmp_path: Path) -> None:
    encoder = encoder_in(tmp_path / "pretrained")
    start = torch.load(encoder, weights_only=True)
    still = ("optimizer.base_learning_rate=1e-9", "schedule.min_learning_rate=0", "max_duration=3ba")
    given = (f"model.encoder={encoder}", "model.name=null", "model.image_size=null")
    path = tmp_path / "fine.yaml"
    path.write_text(RECIPE.replace("  options: {embed_dim: 32, depth: 2, num_heads: 2}\n", ""))
    places = [f"data.{key}={images / name}" for key, name in (("source", "train"), ("test_source", "test"))]
    places += [f"data.cache={images / 'cache'}", f"save_folder={tmp_path / 'run'}"]
    recipe = load_finetuning(path, [*places, *still, *given])
    done = finetune(recipe)
    got = weights(done)
    assert {name for name in start if name not in got} == {"norm.weight", "norm.bias"}
    for name in start.keys() & got.keys():
        torch.testing.assert_close(got[name], start[name], atol=1e-6, rtol=1e-4)
    assert read_classifier(done.classifier).image_size == 16
    # What it started from is not needed any more.
    shutil.rmtree(encoder.parent)
    assert_equal(weights(finetune(recipe)), got)


@pytest.fixture
def tf32() -> Iterator[None]:
    """As Composer sets it on a GPU."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
def test_the_final_accuracy_is_that_of_float32(images: Path, tmp_path: Path) -> None:
    """As `aemim evaluate` gives it, whatever the run trains in."""
    recipe = recipe_in(tmp_path, images)
    plan, (train, test) = prepare_finetuning(recipe), folders_of(recipe)
    tests = test_images(recipe, plan, test, *classes_of(recipe, train, test))
    trainer = build_finetuning(recipe, plan, train, tests, num_classes=2)
    trainer.state.precision = Precision.AMP_BF16  # what a GPU has by default

    def settings(*_: object) -> tuple[Precision, bool]:
        return trainer.state.precision, torch.backends.cuda.matmul.allow_tf32

    seen = []  # on a CPU, Composer computes in float32 whatever it is told
    trainer.state.model.network.head.register_forward_hook(lambda *_: seen.append(settings()))
    accuracy = final_accuracy(trainer, recipe, len(tests))
    trainer.close()
    assert set(seen) == {(Precision.FP32, False)}
    assert settings() == (Precision.AMP_BF16, True)
    assert str(accuracy).endswith("; fp32")


def test_statistics_other_than_the_encoders_are_refused(images: Path, tmp_path: Path) -> None:
    encoder = encoder_in(tmp_path / "pretrained")
    with open(encoder.parent / "recipe.yaml", "a") as file:
        file.write("\ndata: {mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}\n")
    given = [f"model.encoder={encoder}", "data.mean=[0.5,0.5,0.5]"]
    with pytest.raises(
        RecipeError, match=r"data.std=\[0.229, .*pre-trained .* set data.std=\[0.25,0.25,0.25\]"
    ):
        prepare_finetuning(recipe_in(tmp_path, images, *given))
    prepare_finetuning(recipe_in(tmp_path, images, *given, "data.std=[0.25,0.25,0.25]"))


def test_a_checkpoint_is_no_encoder(images: Path, tmp_path: Path) -> None:
    torch.save({"state": Path("x")}, tmp_path / "latest-rank0.pt")
    with pytest.raises(RecipeError, match="no encoder.pt: write one with `aemim export`"):
        prepare_finetuning(recipe_in(tmp_path, images, f"model.encoder={tmp_path / 'latest-rank0.pt'}"))


def test_an_encoder_of_another_architecture_is_refused(images: Path, tmp_path: Path) -> None:
    encoder = encoder_in(tmp_path / "pretrained", depth=1)
    with pytest.raises(RecipeError, match=r"the encoder .*encoder.pt does not fit .*blocks\.1") as caught:
        prepare_finetuning(recipe_in(tmp_path, images, f"model.encoder={encoder}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.encoder=nowhere.pt", "model.encoder=nowhere.pt: no such file; expected an encoder.pt"),
        ("model.name=vit_bose_patch16_224", "model.name=vit_bose_patch16_224: .* did you mean 'vit_base_pa"),
        ("model.name=resnet18", "resnet18: timm cannot build it"),
        ("model.name=null", "model.options: expected model.name"),
        ("model.image_size=18", "model.image_size=18: expected a multiple of 4"),
        ("model.options.depht=2", "unknown key 'depht'; did you mean 'depth'"),
        ("algorithms.aemim=null", "algorithms.aemim: belongs to pre-training"),
        ("augmentation.randaugment=rand9", "randaugment='rand9': expected a policy"),
        ("augmentation.randaugment=rand-m9-n2-mstd", "randaugment='rand-m9-n2-mstd': expected a policy"),
        ("data.test_source=nowhere", "data.test_source=nowhere: expected photos"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_data_is_read(
    images: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        prepare_finetuning(recipe_in(tmp_path, images, override))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.layer_decay=0", "optimizer.layer_decay=0.0: expected in"),
        ("model.drop_path=1.0", "model.drop_path=1.0: expected in"),
        ("augmentation.mixup=-1", "augmentation.mixup=-1.0: expected at least 0"),
        ("eval_interval=2", "eval_interval=2: expected a duration"),
        ("schedule.min_learning_rate=0.01", "min_learning_rate=0.01: expected at most the peak rate, 0.0015"),
        ("data.test_source=null", "data.test_source=None: expected test images"),
        ("data.source=s3://bucket/shards", "model.classes=None: expected their number"),
        ("model.encodre=x", "unknown key 'model.encodre'; did you mean 'encoder'"),
    ],
)
def test_impossible_values_are_named(images: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        recipe_in(tmp_path, images, override)
    assert "\n" not in str(caught.value)


def test_another_number_of_classes_is_refused(images: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, images, "model.classes=3")
    with pytest.raises(RecipeError, match="model.classes=3: expected 2, the classes of"):
        finetune(recipe)


def test_shards_that_name_no_classes_take_those_of_the_test_images(images: Path, tmp_path: Path) -> None:
    train, test = folders_of(recipe_in(tmp_path, images))
    bare = tmp_path / "bare"
    shutil.copytree(train, bare)
    (bare / "conversion.json").unlink()
    places = (f"data.source={bare}", f"data.test_source={test}")
    with pytest.raises(RecipeError, match="model.classes has no value"):
        classes_of(recipe_in(tmp_path, images, *places), bare, test)
    recipe = recipe_in(tmp_path, images, *places, "model.classes=2")
    assert classes_of(recipe, bare, test) == (("0", "1"), 2)
    with pytest.raises(RecipeError, match="model.classes=3: expected 2, the classes of .*test"):
        classes_of(recipe_in(tmp_path, images, *places, "model.classes=3"), bare, test)


def test_test_images_of_other_classes_are_refused(images: Path, tmp_path: Path) -> None:
    for name in ("0", "zebra"):
        (tmp_path / "other" / name).mkdir(parents=True)
        write_png(torch.zeros(3, 20, 20, dtype=torch.uint8), str(tmp_path / "other" / name / "0.png"))
    recipe = recipe_in(tmp_path, images, f"data.test_source={tmp_path / 'other'}")
    with pytest.raises(ValueError, match="zebra") as caught:
        finetune(recipe)
    assert "\n" not in str(caught.value)


def test_a_label_outside_of_the_classes_is_refused(images: Path, tmp_path: Path) -> None:
    train, _ = folders_of(recipe_in(tmp_path, images))
    options: dict[str, Any] = {"image_size": 16, "batch_size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    data = train_data(train, **options, num_classes=1)
    with pytest.raises(ValueError, match="has the label 1, expected one from 0 to 0") as caught:
        next(iter(data.dataloader))
    assert "\n" not in str(caught.value)


def test_another_recipe_does_not_continue_a_run(
    finished: tuple[FineTuneRecipe, FineTuned], images: Path, tmp_path: Path
) -> None:
    other = recipe_in(tmp_path, images, "augmentation.mixup=0.5")
    with pytest.raises(RecipeError, match="^augmentation.mixup: the run in .* another value"):
        prepare_finetuning(replace(other, save_folder=finished[0].save_folder))


def test_a_run_of_another_kind_is_not_continued(
    finished: tuple[FineTuneRecipe, FineTuned], images: Path, tmp_path: Path
) -> None:
    saved = finished[1].recipe.read_text()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(saved.replace("eval_interval", "evaluate_interval"))
    (folder / "latest-rank0.pt").symlink_to("ep1-ba4-rank0.pt")
    with pytest.raises(RecipeError, match="holds a run of another kind"):
        prepare_finetuning(recipe_in(tmp_path, images))


def test_the_command_trains_and_prints(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_in(tmp_path, images)
    places = [f"data.source={images / 'train'}", f"data.test_source={images / 'test'}"]
    places += [f"data.cache={images / 'cache'}", f"save_folder={tmp_path / 'run'}", "max_duration=3ba"]
    for last, expected in ((["--dry-run"], "parameters: 0.06 M"), ([], "95% interval")):
        monkeypatch.setattr("sys.argv", ["aemim", "finetune", str(tmp_path / "fine.yaml"), *places, *last])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        assert expected in capsys.readouterr().out
    assert (tmp_path / "run" / "classifier.pt").exists()


def test_a_dry_run_writes_nothing(images: Path, tmp_path: Path) -> None:
    report = dry_run(recipe_in(tmp_path, images), seconds=0.01)
    assert "learning rate: 0.00156 at its peak" in report
    assert not (tmp_path / "run").exists()
