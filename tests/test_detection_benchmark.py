"""The cost of a detector: what a step does, what is written, and the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import benchmark_script

from aemim_algorithm.detection.model import Heads

SMALL = Heads(
    channels=16,
    box_width=32,
    mask_width=16,
    rpn_pre_nms_top_n_train=50,
    rpn_post_nms_top_n_train=50,
    rpn_pre_nms_top_n_test=50,
    rpn_post_nms_top_n_test=20,
    box_score_thresh=0.0,
    box_detections_per_img=10,
)


@pytest.fixture
def detection(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    script = benchmark_script("detection", monkeypatch)
    monkeypatch.setattr(script, "Heads", lambda box_score_thresh: SMALL)
    return script


def settings(detection: ModuleType, **more: Any) -> Any:
    given = {"model": "test_vit", "size": 64, "images": 2, "precision": "fp32", "device": "cpu", "seed": 0}
    return detection.Settings(**given | more)


def test_training_steps_train_and_recomputing_changes_nothing(
    detection: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    build = detection.build

    def kept(*given: Any, **more: Any) -> Any:
        built.append(build(*given, **more))
        return built[-1]

    monkeypatch.setattr(detection, "build", kept)
    for contender in ("training", "training, recomputed"):
        step = detection.detection_step(contender, settings(detection))
        before = built[-1].network.backbone.encoder.cls_token.clone()
        torch.manual_seed(1)
        step()
        step()
        assert not torch.equal(built[-1].network.backbone.encoder.cls_token, before)
    plain, recomputed = (dict(model.named_parameters()) for model in built)
    assert [model.network.backbone.recompute for model in built] == [False, True]
    assert all(torch.equal(value, recomputed[name]) for name, value in plain.items())


def test_inference_draws_as_many_masks_as_it_may(
    detection: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    forward = detection.Detector.eval_forward

    def kept(*given: Any) -> Any:
        found.append(forward(*given))
        return found[-1]

    monkeypatch.setattr(detection.Detector, "eval_forward", kept)
    detection.detection_step("inference", settings(detection, precision="bf16"))()
    assert [len(each["masks"]) for each in found[0]] == [10, 10]


def test_objects_lie_inside_of_their_images(detection: ModuleType) -> None:
    batch = detection.random_batch(settings(detection, size=100))
    for image, target in zip(batch["image"], batch["target"], strict=True):
        assert image.shape == (3, 100, 100)
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
        assert 0 <= float(target["boxes"].min()) <= float(target["boxes"].max()) <= 100
        sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
        assert torch.equal(target["masks"].flatten(1).sum(1).float(), sides.prod(1))


def fake_measure(makers: dict[str, Callable[[], Any]], **options: Any) -> dict[str, Any]:
    assert options == {"rounds": 3, "device": "cpu", "threads": 1}
    row = {"seconds": [2.0, 4.0, 3.0], "peak_memory_bytes": 3 * 2**30, "built_memory_bytes": 2**30}
    return dict.fromkeys(makers, row) | {"training": {"failed": "out of memory"}}


def test_the_result_has_every_combination_and_its_environment(
    detection: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(detection, "measure_enduring", fake_measure)
    out = tmp_path / "detection.json"
    given = ["--images", "1", "6", "--repeats", "3", "--device", "cpu", "--threads", "1", "--out", str(out)]
    detection.main(given)
    result = json.loads(out.read_text())
    assert {"command", "date", "hardware", "versions", "settings"} <= set(result)
    rows = [(row["precision"], row["images"], row["contender"]) for row in result["measured"]]
    assert rows == [(p, n, c) for p in ("fp32", "bf16") for n in (1, 6) for c in detection.CONTENDERS]
    lines = capsys.readouterr().out.splitlines()
    assert "| fp32 | 1 | training | out of memory | – | – | – |" in lines
    assert "| bf16 | 6 | inference | 3.000 (2.000–4.000) | 2 | 3.00 | 2.00 |" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "--images=0: expected at least 1"),
        (["--size", "8"], "--size=8: expected at least 32 pixels"),
        (["--repeats", "0"], "--repeats=0: expected at least 1"),
    ],
)
def test_bad_arguments(
    detection: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        detection.parse(arguments)
    assert message in capsys.readouterr().err
