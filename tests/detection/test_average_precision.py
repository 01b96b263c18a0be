"""AP as it is logged: 1 for what is perfect, else what pycocotools gives on the same JSON."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_coco import draw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from aemim_algorithm.data.coco import convert_coco
from aemim_algorithm.data.detection_images import DetectionImages
from aemim_algorithm.detection.average_precision import DETAILS, AveragePrecision

Detections = list[dict[str, Tensor]]
KINDS = ("bbox", "segm")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DetectionImages]:
    """Objects from small to large, with crowds and an image without any."""
    folder = tmp_path_factory.mktemp("drawn")
    draw(folder, images=10, sides=(120, 200), objects=4, object_sides=(20, 115), seed=3)
    annotations = folder / "annotations" / "instances_train.json"
    convert_coco(annotations, folder / "train", folder / "shards")
    return annotations, DetectionImages(folder / "shards")


def perfect(images: DetectionImages) -> Detections:
    found = []
    for index in range(len(images)):
        target = images[index][1]
        each = ~target["crowd"]
        count = int(each.sum())
        scores = 1 - torch.arange(count) / 10 - index / 100
        found.append(
            {key: target[key][each] for key in ("boxes", "labels")}
            | {"masks": target["masks"][each].bool(), "scores": scores}
        )
    return found


def shifted(images: DetectionImages) -> Detections:
    """Each object a few pixels off, some of them lost, some found twice, and one where there is nothing."""
    found = []
    for index, each in enumerate(perfect(images)):
        step = index % 7
        masks = torch.zeros_like(each["masks"])
        masks[:, :, step:] = each["masks"][:, :, : masks.shape[2] - step]
        moved = each | {"boxes": each["boxes"] + torch.tensor([step, 0, step, 0]), "masks": masks}
        if len(masks) > 1 and index % 2:
            moved = {key: value[1:] for key, value in moved.items()}
        elif len(masks):
            moved = {key: torch.cat([value, value[:1]]) for key, value in moved.items()}
            moved["labels"][-1] = moved["labels"][-1] % 3 + 1
        if not len(masks):
            boxes, labels = torch.tensor([[5.0, 5.0, 60.0, 60.0]]), torch.tensor([2])
            masks = torch.zeros(1, *masks.shape[1:], dtype=torch.bool)
            masks[:, 5:60, 5:60] = True
            moved = {"boxes": boxes, "labels": labels, "masks": masks, "scores": torch.tensor([0.99])}
        found.append(moved)
    return found


def scored(kind: Any, images: DetectionImages, found: Detections) -> tuple[float, dict[str, float | None]]:
    metric = AveragePrecision(kind)
    for index, each in enumerate(found):
        target = images[index][1]
        objects = {key: target[key] for key in ("boxes", "labels", "masks", "area")}
        metric.update([each], [objects | {"iscrowd": target["crowd"].long()}])
    return float(metric.compute()), metric.details


def of_pycocotools(kind: str, annotations: Path, images: DetectionImages, found: Detections) -> list[float]:
    """Oracle: COCO's own program on COCO's own files, which knows nothing of our targets."""
    from pycocotools import mask as coco_mask

    results: list[dict[str, Any]] = []
    ids = [identity for identity, _ in images.categories]
    for index, each in enumerate(found):
        for box, label, score, mask in zip(
            *(each[key].numpy() for key in ("boxes", "labels", "scores", "masks")), strict=True
        ):
            left, top, right, bottom = map(float, box)
            result = {"image_id": images[index][1]["image_id"], "category_id": ids[label - 1]}
            if kind == "bbox":
                result["bbox"] = [left, top, right - left, bottom - top]
            else:
                result["segmentation"] = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            results.append(result | {"score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats[:6]]


@pytest.mark.parametrize("kind", KINDS)
def test_perfect_detections_have_an_ap_of_one(kind: str, drawn: tuple[Path, DetectionImages]) -> None:
    value, details = scored(kind, drawn[1], perfect(drawn[1]))
    assert value == pytest.approx(1)
    given = [value for value in details.values() if value is not None]
    assert len(given) >= 5
    assert given == pytest.approx([1] * len(given))


@pytest.mark.parametrize("kind", KINDS)
def test_shifted_detections_have_that_of_pycocotools(kind: str, drawn: tuple[Path, DetectionImages]) -> None:
    annotations, images = drawn
    value, details = scored(kind, images, shifted(images))
    expected = of_pycocotools(kind, annotations, images, shifted(images))
    assert 0.1 < expected[0] < 0.9
    assert list(details) == list(DETAILS)
    assert [-1 if found is None else found for found in details.values()] == pytest.approx(expected, abs=1e-6)
    assert value == pytest.approx(expected[0], abs=1e-6)


def test_detections_in_a_crowd_do_not_count(drawn: tuple[Path, DetectionImages]) -> None:
    _, images = drawn
    number = next(index for index in range(len(images)) if images[index][1]["crowd"].any())
    found = perfect(images)
    target = images[number][1]
    crowd = target["crowd"]
    inside = {key: target[key][crowd] for key in ("boxes", "labels")} | {
        "masks": target["masks"][crowd].bool(),
        "scores": torch.ones(int(crowd.sum())),
    }
    found[number] = {key: torch.cat([value, inside[key]]) for key, value in found[number].items()}
    assert scored("bbox", images, found)[0] == pytest.approx(1)
    elsewhere = found[number]["labels"].clone()
    elsewhere[-1] = elsewhere[-1] % 3 + 1  # no crowd of that kind
    found[number]["labels"] = elsewhere
    assert scored("bbox", images, found)[0] < 0.99


def test_nothing_found_is_zero(drawn: tuple[Path, DetectionImages]) -> None:
    none = [{key: value[:0] for key, value in each.items()} for each in perfect(drawn[1])]
    assert scored("bbox", drawn[1], none)[0] == 0
    assert scored("segm", drawn[1], none)[0] == 0
