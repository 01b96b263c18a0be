"""A recipe from an encoder and shards to a scored detector: what it writes, resumes and refuses."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_coco import draw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from small_detectors import HEADS
from small_runs import killed_at
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aemim_algorithm.callbacks.history import read_history
from aemim_algorithm.cli import main
from aemim_algorithm.data.coco import convert_coco
from aemim_algorithm.data.detection_images import DetectionImages
from aemim_algorithm.detection import backbone
from aemim_algorithm.detection.design import read_detector
from aemim_algorithm.detection.windows import WindowBlock
from aemim_algorithm.evaluation.runs import read_run
from aemim_algorithm.models import MODELS
from aemim_algorithm.recipes.detect import Detected, detect
from aemim_algorithm.recipes.detect_dry_run import dry_run_detection
from aemim_algorithm.recipes.detect_preflight import prepare_detection
from aemim_algorithm.recipes.detect_schema import DetectRecipe, load_detection
from aemim_algorithm.recipes.schema import RecipeError

RECIPE = f"""
model:
  encoder: random
  name: mae_vit_tiny_patch4
  options: {{patch_size: 8, image_size: 32, embed_dim: 32, depth: 2, num_heads: 2}}
  drop_path: 0.1
  window: 3
  global_blocks: 1
  short_sides: [40, 48]
  long_side: 64
  heads: {json.dumps(vars(HEADS) | {"box_score_thresh": 0.0})}
data: {{workers: 0}}
optimizer: {{base_learning_rate: 0.16, weight_decay: 0.05, betas: [0.9, 0.999], layer_decay: 0.75}}
schedule: {{warmup: 2ba, milestones: [1ep], step_factor: 0.1, min_learning_rate: 0.0}}
max_duration: 2ep
global_batch_size: 4
device_train_microbatch_size: 2
device: cpu
"""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen images to train on, in three batches of four, and five to test on."""
    folder = tmp_path_factory.mktemp("sets")
    for part, images in (("train", 17), ("test", 5)):
        draw(folder, images=images, part=part)
        convert_coco(folder / "annotations" / f"instances_{part}.json", folder / part, folder / f"{part}-mds")
    return folder


def recipe_in(folder: Path, sets: Path, *overrides: str) -> DetectRecipe:
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    places = [f"data.source={sets / 'train-mds'}", f"data.test_source={sets / 'test-mds'}"]
    return load_detection(path, [*places, f"save_folder={folder / 'run'}", *overrides])


@pytest.fixture(scope="module")
def finished(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DetectRecipe, Detected]:
    recipe = recipe_in(tmp_path_factory.mktemp("finished"), sets)
    return recipe, detect(recipe, command=["aemim", "detect", "tiny.yaml"])


def weights(done: Detected) -> dict[str, Tensor]:
    return dict(read_detector(done.detector).network.state_dict())


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [key for key in left if not torch.equal(left[key], right[key])]


def of_pycocotools(kind: str, detector: Path, sets: Path) -> list[float]:
    """Oracle: the detector from its file, image by image, under COCO's own program."""
    found = read_detector(detector)
    images = DetectionImages(sets / "test-mds")
    results: list[dict[str, Any]] = []
    for index in range(len(images)):
        image, target = images[index]
        with torch.no_grad():
            (seen,) = found.network([image / 255])
        for number, (left, top, right, bottom) in enumerate(seen["boxes"].tolist()):
            category, _ = found.categories[int(seen["labels"][number]) - 1]
            mask = (seen["masks"][number, 0] > 0.5).numpy().astype(np.uint8)
            what = (
                {"bbox": [left, top, right - left, bottom - top]}
                if kind == "bbox"
                else {"segmentation": coco_mask.encode(np.asfortranarray(mask))}
            )
            what |= {"image_id": target["image_id"], "score": float(seen["scores"][number])}
            results.append(what | {"category_id": category})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(sets / "annotations" / "instances_test.json"))
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
            step()
    return [100 * float(value) if value >= 0 else -1 for value in evaluation.stats[:6]]


def test_a_run_leaves_what_it_says(finished: tuple[DetectRecipe, Detected], sets: Path) -> None:
    recipe, done = finished
    assert load_detection(done.recipe) == recipe
    kept = read_detector(done.detector)
    assert kept.categories == ((2, "triangle"), (5, "rectangle"), (9, "disc"))
    assert kept.design.view.short_sides == (40, 48)
    lines = [line for line in read_history(done.history.parent) if "loss/train/total" in line]
    assert [line["batch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["loss/train/loss_mask"] > 0
    rates = [0.0, 0.0, 0.00125, 0.0025, 0.00025, 0.00025]  # Composer's schedulers are a batch behind
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    report = json.loads(done.results.read_text())
    assert (report["box"], report["mask"]) == (done.box, done.mask)
    assert (report["images"], report["run"], report["command"]) == (5, "tiny", "aemim detect tiny.yaml")
    assert {"box_AP": 48.7, "mask_AP": 43.0}.items() <= report["paper"][-1].items()
    assert "| ViT-B | AEMIM | 800 | 48.7 | 43.0 |\n| – | **tiny** | – |" in done.table.read_text()
    rows = {row["metric"]: row["value"] for row in report["results"]}
    expected = {f"{kind} {name}": value for kind in ("box", "mask") for name, value in report[kind].items()}
    assert rows == {name: value for name, value in expected.items() if value is not None}
    assert {row["set"] for row in report["results"]} == {"test-mds"}
    run = read_run(done.results.parent, name="tiny")
    assert run.scores()["test-mds box AP"].value == done.box["AP"]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_scores_are_those_of_the_kept_detector(
    kind: str, finished: tuple[DetectRecipe, Detected], sets: Path
) -> None:
    done = finished[1]
    scores = done.box if kind == "bbox" else done.mask
    found = [-1 if value is None else value for value in scores.values()]
    assert found == pytest.approx(of_pycocotools(kind, done.detector, sets), abs=1e-4)


def test_a_finished_run_can_be_started_again(finished: tuple[DetectRecipe, Detected]) -> None:
    recipe, done = finished
    before = weights(done)
    again = detect(recipe)
    assert differing(weights(again), before) == []
    assert (again.box, again.mask) == (done.box, done.mask)
    scored = [line["batch"] for line in read_history(done.history.parent) if "eval" in line]
    assert scored == [3, 6]


# Composer wonders that an epoch has no batch left after a checkpoint at its last one.
@pytest.mark.filterwarnings("ignore:No batches were trained")
@pytest.mark.parametrize(
    ("save_interval", "last"), [("2ba", 5), ("1ep", 5)], ids=["in mid-epoch", "between epochs"]
)
def test_an_interrupted_run_continues_as_if_it_had_not_been(
    save_interval: str,
    last: int,
    sets: Path,
    tmp_path: Path,
    finished: tuple[DetectRecipe, Detected],
) -> None:
    """Order, mirroring, sizes, drop path, torchvision's sampling, and an evaluation in between."""
    recipe = recipe_in(tmp_path, sets, f"save_interval={save_interval}")

    with killed_at(last):
        detect(recipe)
    done = detect(recipe)
    assert differing(weights(done), weights(finished[1])) == []
    assert done.box == finished[1].box


def test_recomputed_blocks_change_nothing(
    sets: Path,
    tmp_path: Path,
    finished: tuple[DetectRecipe, Detected],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recomputed = []

    def spied(block: WindowBlock, *inputs: Any, **options: Any) -> Any:
        recomputed.append(block)
        return checkpoint(block, *inputs, **options)

    monkeypatch.setattr(backbone, "checkpoint", spied)
    done = detect(recipe_in(tmp_path, sets, "activation_checkpointing=true"))
    assert len(recomputed) == 6 * 2 * 2  # steps, micro-batches, blocks
    assert differing(weights(done), weights(finished[1])) == []


def test_bfloat16_rounds_the_losses_and_no_weight(
    sets: Path, tmp_path: Path, finished: tuple[DetectRecipe, Detected]
) -> None:
    done = detect(recipe_in(tmp_path, sets, "precision=amp_bf16", "activation_checkpointing=true"))
    # What the first proposals are compared with are anchors, which no weight moves.
    exact, rounded = (
        read_history(run.history.parent)[0]["loss/train/loss_objectness"] for run in (finished[1], done)
    )
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    assert {value.dtype for value in weights(done).values() if value.is_floating_point()} == {torch.float32}


def encoder_in(folder: Path, **sizes: int) -> Path:
    """An encoder file of a small MAE, with the recipe that a run leaves beside it."""
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "image_size": 32, "patch_size": 8} | sizes
    rest = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    torch.manual_seed(1)
    encoder: Any = MODELS["mae_vit_tiny_patch4"](**options, **rest).encoder
    folder.mkdir(exist_ok=True)
    torch.save(encoder.state_dict(), folder / "encoder.pt")
    (folder / "recipe.yaml").write_text(
        "model: " + json.dumps({"name": "mae_vit_tiny_patch4"} | options | rest)
    )
    return folder / "encoder.pt"


def test_a_frozen_encoder_is_that_of_its_file(sets: Path, tmp_path: Path) -> None:
    """The recipe beside it tells the architecture; what it started from is not needed to continue."""
    encoder = encoder_in(tmp_path / "pretrained")
    start = torch.load(encoder, weights_only=True)
    given = [f"model.encoder={encoder}", "model.freeze_encoder=true", "model.name=null", "model.options={}"]
    path = tmp_path / "tiny.yaml"
    path.write_text(
        RECIPE.replace("  options: {patch_size: 8,", "  options: {} #").replace("milestones: [1ep], ", "")
    )
    places = [f"data.source={sets / 'train-mds'}", f"data.test_source={sets / 'test-mds'}"]
    short = ["max_duration=3ba", "activation_checkpointing=true", f"save_folder={tmp_path / 'run'}"]
    recipe = load_detection(path, [*places, *short, *given])
    done = detect(recipe)
    got = weights(done)
    for name, value in start.items():
        assert torch.equal(got[f"backbone.encoder.{name}"], value), name
    shutil.rmtree(encoder.parent)
    assert differing(weights(detect(recipe)), got) == []
    assert json.loads(done.results.read_text())["encoder"] == f"frozen {encoder}"


def test_an_export_for_another_image_size_starts_with_its_own_positions(sets: Path, tmp_path: Path) -> None:
    from aemim_algorithm.export import export_encoder

    encoder = encoder_in(tmp_path / "pretrained")
    state = {f"encoder.{name}": value for name, value in torch.load(encoder, weights_only=True).items()}
    model: Any = MODELS["mae_vit_tiny_patch4"](
        embed_dim=32, depth=2, num_heads=2, image_size=32, patch_size=8
    )
    exported = export_encoder(state, encoder, image_size=48, model=model)
    plan = prepare_detection(recipe_in(tmp_path, sets, f"model.encoder={encoder}"))
    network = plan.model(3).network
    assert torch.equal(network.backbone.encoder.pos_embed, exported["pos_embed"])
    assert network.backbone.encoder.pos_embed.shape[1] == 37


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.encoder=nowhere.pt", "model.encoder=nowhere.pt: no such file; expected an encoder.pt"),
        ("model.name=vit_bose_patch16_224", "model.name=vit_bose_patch16_224: .* did you mean 'vit_base_pa"),
        ("model.options.depht=2", "unknown key 'depht'; did you mean 'depth'"),
        ("model.options.patch_size=2", "model: got patches of 2x2 pixels; expected a power of two"),
        ("algorithms.aemim=null", "algorithms.aemim: belongs to pre-training"),
        ("data.test_source=nowhere", "data.test_source=nowhere: expected a folder of shards .*no such folder"),
        ("data.source=photos", "data.source=photos: expected a folder of shards that `aemim data coco` wrote"),
        ("data.source=s3://bucket/coco", "data.source=s3://bucket/coco: expected a local folder"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_data_is_read(
    sets: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        prepare_detection(recipe_in(tmp_path, sets, override))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.layer_decay=0", "optimizer.layer_decay=0.0: expected in"),
        ("model.drop_path=1.0", "model.drop_path=1.0: expected in"),
        ("model.window=0", "model.window=0: expected at least 1 patch, or null"),
        ("model.short_sides=[]", r"model.short_sides=\[\]: expected one or more"),
        ("model.long_side=40", "model.long_side=40: expected at least 48 pixels"),
        ("model.heads.channels=0", "model.heads.channels=0: expected at least 1"),
        ("model.heads.box_detections_per_img=300", "box_detections_per_img=300: expected at most 100"),
        ("model.heads.box_widht=2", "unknown key 'model.heads.box_widht'; did you mean 'box_width'"),
        ("schedule.milestones=[2ep]", "schedule.milestones=.*below max_duration=2ep"),
        ("eval_interval=2", "eval_interval=2: expected a duration"),
        ("data.test_source=null", "data.test_source=None: expected shards to be scored on"),
        ("data.resident=true", "data.resident: leave it out: a detector sees whole images"),
        ("data.crop_scale=[0.5,1.0]", "data.crop_scale: leave it out"),
        ("compile=true", "compile=True: expected false"),
        ("device_train_microbatch_size=auto", "device_train_microbatch_size=auto: expected a number"),
        ("parallelism.fsdp2=null", "parallelism=.*: expected null"),
    ],
)
def test_impossible_values_are_named(sets: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        recipe_in(tmp_path, sets, override)
    assert "\n" not in str(caught.value)


def test_an_encoder_of_another_architecture_is_refused(sets: Path, tmp_path: Path) -> None:
    encoder = encoder_in(tmp_path / "pretrained", depth=1)
    with pytest.raises(RecipeError, match=r"the encoder .*encoder.pt does not fit .*blocks\.1"):
        prepare_detection(recipe_in(tmp_path, sets, f"model.encoder={encoder}"))


def test_more_images_than_there_are_is_refused(sets: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, sets, "global_batch_size=20", "schedule.warmup=0ba")
    with pytest.raises(
        RecipeError, match="global_batch_size=20: expected at most 14, the images with objects"
    ):
        detect(recipe)


def test_other_images_or_settings_do_not_continue_a_run(
    finished: tuple[DetectRecipe, Detected], sets: Path, tmp_path: Path
) -> None:
    recipe = finished[0]
    with pytest.raises(RecipeError, match="^model.window: .* started with another value \\(3, now 2\\)"):
        prepare_detection(replace(recipe, model=replace(recipe.model, window=2)))
    swapped = replace(recipe.data, source=str(sets / "test-mds"))
    with pytest.raises(RecipeError, match="5 images in 1 shards, which are not the 17"):
        detect(replace(recipe, data=swapped, max_duration="3ep"))


@pytest.mark.parametrize("warmup", ["3ba", "1ep", "12sp", "0.5dur"])
def test_a_warm_up_beyond_the_first_step_is_refused(sets: Path, tmp_path: Path, warmup: str) -> None:
    """Composer would leave the step out."""
    with pytest.raises(RecipeError, match=r"schedule.warmup=.*: expected fewer than the 3 batches until 1ep"):
        recipe = recipe_in(tmp_path, sets)
        detect(replace(recipe, schedule=replace(recipe.schedule, warmup=warmup)))


def test_test_images_without_the_empty_ones_are_refused(sets: Path, tmp_path: Path) -> None:
    annotations = sets / "annotations" / "instances_test.json"
    convert_coco(annotations, sets / "test", tmp_path / "few", keep_empty=False)
    with pytest.raises(RecipeError, match=r"data.test_source=.*few: 1 images without objects were left out"):
        detect(recipe_in(tmp_path, sets, f"data.test_source={tmp_path / 'few'}"))


def test_other_categories_to_test_on_are_refused(sets: Path, tmp_path: Path) -> None:
    coco = json.loads((sets / "annotations" / "instances_test.json").read_text())
    coco["categories"].append({"id": 11, "name": "star"})
    (tmp_path / "more.json").write_text(json.dumps(coco))
    convert_coco(tmp_path / "more.json", sets / "test", tmp_path / "more")
    recipe = recipe_in(tmp_path, sets, f"data.test_source={tmp_path / 'more'}")
    for run in (detect, dry_run_detection):
        with pytest.raises(
            RecipeError, match=r"data.test_source=.*more: its categories are not those of data\."
        ):
            run(recipe)


def test_a_dry_run_counts_what_a_run_would_do_and_writes_nothing(sets: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, sets, "model.freeze_encoder=true")
    report = dry_run_detection(recipe)
    images = DetectionImages(sets / "train-mds", train=True)
    assert f"data: {len(images)} training images with objects of {len(images.categories)} cat" in report
    assert f"length: {2 * (len(images) // 4)} steps of 4 images" in report
    assert "learning rate: 0.0025 at its peak (base rate x 4 / 256)" in report
    network = prepare_detection(recipe).model(len(images.categories)).network
    backbone, whole, trained = (
        sum(value.numel() for value in values) / 1e6
        for values in (
            network.backbone.parameters(),
            network.parameters(),
            (value for name, value in network.named_parameters() if "backbone.encoder." not in name),
        )
    )
    assert (
        f"parameters: backbone {backbone:.2f} M, heads {whole - backbone:.2f} M, together {whole:.2f} M, of "
        f"which {trained:.2f} M are trained" in report
    )
    assert not (tmp_path / "run").exists()


def test_the_command_trains_and_prints(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_in(tmp_path, sets)
    places = [f"data.source={sets / 'train-mds'}", f"data.test_source={sets / 'test-mds'}"]
    places += [f"save_folder={tmp_path / 'run'}", "max_duration=3ba", "schedule.milestones=[]"]
    for last, code in (("model.window=0", 2), ("--dry-run", 0), ("seed=3", 0)):
        monkeypatch.setattr("sys.argv", ["aemim", "detect", str(tmp_path / "tiny.yaml"), *places, last])
        with pytest.raises(SystemExit) as ended:
            main()
        assert int(ended.value.code or 0) == code
        out, err = capsys.readouterr()
        assert ("expected at least 1 patch" in err) == (code == 2)
        assert ("length: 3 steps" in out) == (last == "--dry-run")
    assert out.splitlines()[0].split() == ["AP,", "%", "AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert f"detector    {tmp_path / 'run' / 'detector.pt'}" in out


def test_files_that_are_no_detector_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file; expected the detector.pt"):
        read_detector(tmp_path / "none.pt")
    torch.save({"model": {}}, tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match="lacks 'encoder'; expected the detector.pt"):
        read_detector(tmp_path / "encoder.pt")
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="does not read as a detector"):
        read_detector(tmp_path / "broken.pt")
