from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_coco import draw, inside, polygon_area, runs
from pycocotools.coco import COCO
from torch.utils.data import DataLoader
from torchvision.io import encode_png

from aemim_algorithm.data.coco import SUMMARY, convert_coco
from aemim_algorithm.data.damage import BrokenSampleError
from aemim_algorithm.data.detection_images import DetectionImages
from aemim_algorithm.data.shards import write_shards
from aemim_algorithm.data.transforms import decode

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    # pycocotools' own decoding, which is the oracle only.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

Coco = dict[str, Any]


def convert(folder: Path, coco: Coco) -> Path:
    path = folder / "annotations" / "instances_train.json"
    path.write_text(json.dumps(coco))
    convert_coco(path, folder / "train", folder / "out", progress=False)
    return folder / "out"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Coco]:
    folder = tmp_path_factory.mktemp("drawn")
    coco = draw(folder, images=10)
    convert(folder, coco)
    return folder, coco


def points(annotation: dict[str, Any]) -> list[tuple[float, float]]:
    numbers = annotation["segmentation"][0]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_the_drawn_set_has_what_the_tests_need(drawn: tuple[Path, Coco], tmp_path: Path) -> None:
    folder, coco = drawn
    objects = [a for a in coco["annotations"] if not a["iscrowd"]]
    assert {a["category_id"] for a in objects} == {2, 5, 9}
    assert len(objects) < len(coco["annotations"])
    assert {Path(image["file_name"]).suffix for image in coco["images"]} == {".jpg", ".png"}
    assert len({(image["height"], image["width"]) for image in coco["images"]}) > 5
    assert draw(tmp_path, images=10) == coco
    assert draw(tmp_path, images=10, part="val") != coco
    names = [image["file_name"] for image in coco["images"]]
    assert all((tmp_path / "train" / n).read_bytes() == (folder / "train" / n).read_bytes() for n in names)


def test_numbers_of_the_drawn_set_are_those_of_its_shapes(drawn: tuple[Path, Coco]) -> None:
    """A rectangle's area is that of its box, a triangle's is half, and a disc's nearly π / 4 of it."""
    _, coco = drawn
    of_box = {5: 1.0, 2: 0.5, 9: 24 / 2 * np.sin(2 * np.pi / 24) / 4}
    for annotation in coco["annotations"]:
        if not annotation["iscrowd"]:
            _, _, width, height = annotation["bbox"]
            share = annotation["area"] / (width * height)
            assert share == pytest.approx(of_box[annotation["category_id"]], rel=2e-3)
            assert annotation["area"] == polygon_area(points(annotation))


def test_masks_and_boxes_are_those_that_pycocotools_gives(drawn: tuple[Path, Coco]) -> None:
    folder, coco = drawn
    images, oracle = DetectionImages(folder / "out"), COCO()
    oracle.dataset = coco
    oracle.createIndex()
    for index, entry in enumerate(coco["images"]):
        image, target = images[index]
        annotations = oracle.loadAnns(oracle.getAnnIds(entry["id"]))
        assert image.equal(decode((folder / "train" / entry["file_name"]).read_bytes()))
        assert image.shape[1:] == images.sizes[index] == (entry["height"], entry["width"])
        assert target["image_id"] == entry["id"]
        assert target["masks"].shape == (len(annotations), *image.shape[1:])
        for number, annotation in enumerate(annotations):
            assert np.array_equal(target["masks"][number], oracle.annToMask(annotation))
            left, top, width, height = annotation["bbox"]
            box = torch.tensor([left, top, left + width, top + height], dtype=torch.float32)
            assert target["boxes"][number].equal(box)
        assert target["crowd"].tolist() == [bool(a["iscrowd"]) for a in annotations]
        assert target["area"].tolist() == pytest.approx([a["area"] for a in annotations])
        assert target["labels"].tolist() == [{2: 1, 5: 2, 9: 3}[a["category_id"]] for a in annotations]
        kinds = {key: value.dtype for key, value in target.items() if key != "image_id"}
        assert kinds == {
            "boxes": torch.float32,
            "labels": torch.int64,
            "masks": torch.uint8,
            "crowd": torch.bool,
            "area": torch.float32,
        }
    assert images.categories == [(2, "triangle"), (5, "rectangle"), (9, "disc")]


def test_masks_cover_the_pixels_that_were_painted(drawn: tuple[Path, Coco]) -> None:
    """Without pycocotools: rectangles and crowds to the pixel, the others but for their borders."""
    folder, coco = drawn
    images = DetectionImages(folder / "out")
    seen = set()
    for index, entry in enumerate(coco["images"]):
        image, target = images[index]
        size = image.shape[1:]
        annotations = [a for a in coco["annotations"] if a["image_id"] == entry["id"]]
        for mask, annotation in zip(target["masks"].bool().numpy(), annotations, strict=True):
            left, top, width, height = annotation["bbox"]
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            if annotation["iscrowd"]:
                assert runs(mask) == annotation["segmentation"]["counts"]
                assert int(mask.sum()) == annotation["area"]
                box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
                assert annotation["bbox"] == box
            elif annotation["category_id"] == 5:
                assert mask[top : top + height, left : left + width].all()
                assert int(mask.sum()) == width * height == annotation["area"]
            else:
                painted = inside(points(annotation), *size)
                assert (mask & painted).sum() / (mask | painted).sum() > 0.8
            if entry["file_name"].endswith("png") and not annotation["iscrowd"]:
                colours = image.numpy()[:, inside(points(annotation), *size)]
                assert (colours == colours[:, :1]).all()
            seen.add((annotation["category_id"], annotation["iscrowd"]))
    assert len(seen) == 4


def test_training_sees_neither_crowds_nor_images_without_objects(
    drawn: tuple[Path, Coco], tmp_path: Path
) -> None:
    coco = draw(tmp_path, images=10)
    crowd = next(a for a in coco["annotations"] if a["iscrowd"])
    others = [a for a in coco["annotations"] if a["image_id"] != crowd["image_id"]]
    coco["annotations"] = [*others, crowd]
    out = convert(tmp_path, coco)
    everything, learned = DetectionImages(out), DetectionImages(out, train=True)
    with_objects = [i for i in range(10) if not everything[i][1]["crowd"].all()]
    assert (len(everything), len(learned), len(with_objects)) == (10, 7, 7)
    assert learned.sizes == [everything.sizes[i] for i in with_objects]
    for index, original in enumerate(with_objects):
        (image, target), (same, full) = learned[index], everything[original]
        assert image.equal(same)
        assert target["image_id"] == full["image_id"]
        assert len(target["crowd"]) > 0
        assert not target["crowd"].any()
        for key in ("boxes", "labels", "masks", "area"):
            assert target[key].equal(full[key][~full["crowd"]])
    empty = everything[4][1]
    height, width = everything.sizes[4]
    assert {key: tuple(value.shape) for key, value in empty.items() if key != "image_id"} == {
        "boxes": (0, 4),
        "labels": (0,),
        "masks": (0, height, width),
        "crowd": (0,),
        "area": (0,),
    }


def test_boxes_end_with_their_image_in_training_only(tmp_path: Path) -> None:
    coco = draw(tmp_path, images=1, crowd_every=0)
    entry, first = coco["images"][0], coco["annotations"][0]
    width, height = entry["width"], entry["height"]
    first["bbox"] = [-0.5, -1, width + 1.25, height + 1]
    out = convert(tmp_path, coco)
    assert DetectionImages(out)[0][1]["boxes"][0].tolist() == [-0.5, -1, width + 0.75, height]
    assert DetectionImages(out, train=True)[0][1]["boxes"][0].tolist() == [0, 0, width, height]


def test_workers_read_the_same(drawn: tuple[Path, Coco]) -> None:
    images = DetectionImages(drawn[0] / "out", train=True)
    copy = pickle.loads(pickle.dumps(images))
    loader = DataLoader(copy, batch_size=None, num_workers=1)
    read = list(loader)
    assert len(read) == len(images)
    for index, (same, again) in enumerate(read):
        image, target = images[index]
        assert image.equal(same)
        assert target["masks"].equal(again["masks"])


def test_folders_that_are_something_else_are_one_line(tmp_path: Path) -> None:
    coco = draw(tmp_path, images=2)
    out = convert(tmp_path, coco)
    with pytest.raises(ValueError, match=r"^[^\n]* has no index.json[^\n]*$"):
        DetectionImages(tmp_path / "train")
    with pytest.raises(IndexError):
        DetectionImages(out)[2]
    png = torch.zeros(3, 8, 8, dtype=torch.uint8)
    write_shards([(encode_png(png).numpy().tobytes(), 0)], tmp_path / "labels", classes=("a",), made_from={})
    with pytest.raises(ValueError, match=r"has the columns .*: write the shards with `aemim data coco`$"):
        DetectionImages(tmp_path / "labels")
    np.save(out / SUMMARY, np.zeros((1, 3), np.int32))
    with pytest.raises(ValueError, match=r"no readable samples\.npy of its 2 samples"):
        DetectionImages(out)
    (out / SUMMARY).write_bytes(b"")
    with pytest.raises(ValueError, match=r"no readable samples\.npy"):
        DetectionImages(out)
    (out / "conversion.json").unlink()
    with pytest.raises(ValueError, match=r"no readable conversion\.json"):
        DetectionImages(out)
    (out / "shard.00000.mds").unlink()
    with pytest.raises(ValueError, match="is missing or cut short"):
        DetectionImages(out)


def test_nothing_to_train_on_is_an_error_and_damage_names_the_sample(tmp_path: Path) -> None:
    coco = draw(tmp_path, images=2, empty_every=1)
    out = convert(tmp_path, coco)
    assert len(DetectionImages(out)) == 2
    with pytest.raises(ValueError, match="nothing to train on"):
        DetectionImages(out, train=True)
    shard = out / "shard.00000.mds"
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"\xff\xd8\xff", b"\0\0\0"))
    with pytest.raises(BrokenSampleError, match=r"sample 0 \(shard\.00000\.mds\)"):
        DetectionImages(out)[0]
