from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drawn_coco import draw
from pycocotools import mask as coco_mask
from streaming import LocalDataset, MDSWriter

from aemim_algorithm import cli
from aemim_algorithm.data.coco import CocoConversion, convert_coco
from aemim_algorithm.data.convert import report_path
from aemim_algorithm.data.detection_images import coco_of
from aemim_algorithm.data.shards import ConversionError
from aemim_algorithm.data.streaming import class_names

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

Coco = dict[str, Any]


class Drawn:
    """A drawn set in a folder, which tests change and convert."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.coco = draw(folder, images=10, sides=(40, 56))
        self.path = folder / "annotations" / "instances_train.json"

    def save(self) -> None:
        self.path.write_text(json.dumps(self.coco))

    def convert(self, **options: Any) -> CocoConversion:
        return convert_coco(self.path, self.folder / "train", self.out, progress=False, **options)

    def file(self, image: int) -> Path:
        return self.folder / "train" / self.coco["images"][image]["file_name"]

    def without(self, *, images: set[int] = frozenset(), annotations: set[int] = frozenset()) -> Coco:
        """What is left without images and annotations of these ids."""
        left = [a for a in self.coco["annotations"] if a["id"] not in annotations]
        return {
            "images": [image for image in self.coco["images"] if image["id"] not in images],
            "annotations": [a for a in left if a["image_id"] not in images],
            "categories": self.coco["categories"],
        }


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    Drawn(folder)
    return folder


@pytest.fixture
def drawn(original: Path, tmp_path: Path) -> Drawn:
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return Drawn(tmp_path)


def by_id(coco: Coco) -> Coco:
    return {key: sorted(entries, key=lambda entry: entry["id"]) for key, entries in coco.items()}


def test_what_was_converted_comes_back_exactly(drawn: Drawn) -> None:
    """Every key, also those that COCO does not have, floats to the last bit, and the files verbatim."""
    drawn.coco["images"][0]["flickr_url"] = "ü"
    drawn.coco["annotations"][0] |= {"area": 0.1 + 0.2, "keypoints": [1, 2, 2], "score": None}
    del drawn.coco["annotations"][1]["iscrowd"]
    crowd = next(a for a in drawn.coco["annotations"] if a.get("iscrowd"))
    runs = coco_mask.frPyObjects(crowd["segmentation"], *crowd["segmentation"]["size"])
    crowd["segmentation"] = {"size": list(runs["size"]), "counts": runs["counts"].decode()}
    drawn.save()
    drawn.convert()
    assert by_id(coco_of(drawn.out)) == by_id(drawn.coco)
    files = [sample["image"] for sample in LocalDataset(str(drawn.out))[:]]
    assert files == [drawn.file(image).read_bytes() for image in range(10)]
    assert not report_path(drawn.out).exists()


def test_the_description_counts_what_is_there(drawn: Drawn) -> None:
    done = drawn.convert()
    names = {2: "triangle", 5: "rectangle", 9: "disc"}
    assert done.classes == tuple(names.values())
    objects = [a["category_id"] for a in drawn.coco["annotations"] if not a["iscrowd"]]
    assert done.objects == tuple(objects.count(identity) for identity in names)
    assert done.annotations == len(drawn.coco["annotations"])
    assert done.crowds == done.annotations - len(objects) > 0
    assert (done.samples, done.empty, done.dropped, done.broken, done.faults) == (10, 2, 0, (), {})
    assert class_names(drawn.out) == list(done.classes)
    description = json.loads((drawn.out / "conversion.json").read_text())
    assert description["categories"] == by_id(drawn.coco)["categories"]
    assert str(drawn.folder) not in json.dumps(description)


def test_images_without_objects_can_be_dropped_also_those_of_crowds_only(drawn: Drawn) -> None:
    crowd = next(a for a in drawn.coco["annotations"] if a["iscrowd"])
    others = [a for a in drawn.coco["annotations"] if a["image_id"] != crowd["image_id"]]
    drawn.coco["annotations"] = [*others, crowd]
    drawn.save()
    done = drawn.convert(keep_empty=False)
    assert (done.samples, done.empty, done.dropped) == (7, 0, 3)
    with_objects = {a["image_id"] for a in drawn.coco["annotations"] if not a["iscrowd"]}
    assert {image["id"] for image in coco_of(drawn.out)["images"]} == with_objects


def annotation(change: dict[str, Any]) -> Callable[[Drawn], dict[str, set[int]]]:
    """Change the first annotation; say which are to be left out."""

    def apply(drawn: Drawn) -> dict[str, set[int]]:
        broken = drawn.coco["annotations"][0]
        assert (broken["image_id"], len(broken["segmentation"])) == (11, 1)
        broken |= change
        return {"annotations": {broken["id"]}}

    return apply


def image(change: dict[str, Any]) -> Callable[[Drawn], dict[str, set[int]]]:
    """Change the first image's entry; its annotations are left out with it."""

    def apply(drawn: Drawn) -> dict[str, set[int]]:
        drawn.coco["images"][0] |= change
        return {"images": {11}}

    return apply


def same_annotation_id(drawn: Drawn) -> dict[str, set[int]]:
    drawn.coco["annotations"].append(drawn.coco["annotations"][0])
    return {}


def same_image_id(drawn: Drawn) -> dict[str, set[int]]:
    drawn.coco["images"].append(drawn.coco["images"][0])
    return {}


def remove_file(drawn: Drawn) -> dict[str, set[int]]:
    drawn.file(0).unlink()
    return {"images": {11}}


def cut_file(drawn: Drawn) -> dict[str, set[int]]:
    drawn.file(0).write_bytes(drawn.file(0).read_bytes()[:300])
    return {"images": {11}}


def exchange_files(drawn: Drawn) -> dict[str, set[int]]:
    shutil.copy(drawn.file(1), drawn.file(0))
    return {"images": {11}}


SEGMENTATION = "malformed segmentation"
BROKEN: dict[str, tuple[str, Callable[[Drawn], dict[str, set[int]]]]] = {
    "box too far right": ("box outside of its image", annotation({"bbox": [30, 3, 60.0, 6]})),
    "box too far up": ("box outside of its image", annotation({"bbox": [3, -1.5, 6, 6]})),
    "box beside": ("box outside of its image", annotation({"bbox": [-0.9, 3, 0.9, 6]})),
    "no width": ("zero area", annotation({"bbox": [3, 3, 0.0, 6]})),
    "negative height": ("zero area", annotation({"bbox": [3, 3, 6, -6]})),
    "no area": ("zero area", annotation({"area": 0})),
    "category": ("unknown category", annotation({"category_id": 3})),
    "no such image": ("annotation of an unknown image", annotation({"image_id": 12})),
    "id is text": ("malformed annotation", annotation({"id": "7"})),
    "corners": ("malformed annotation", annotation({"bbox": [1, 2, 3]})),
    "not a number": ("malformed annotation", annotation({"bbox": [1, 2, float("nan"), 4]})),
    "huge": ("malformed annotation", annotation({"bbox": [1, 2, 10**400, 4]})),
    "area is missing": ("malformed annotation", annotation({"area": None})),
    "half a crowd": ("malformed annotation", annotation({"iscrowd": 0.5})),
    "no segmentation": (SEGMENTATION, annotation({"segmentation": None})),
    "no polygon": (SEGMENTATION, annotation({"segmentation": []})),
    "flat polygon": (SEGMENTATION, annotation({"segmentation": [1, 1, 9, 1, 9, 9]})),
    "two points": (SEGMENTATION, annotation({"segmentation": [[1, 1, 9, 9]]})),
    "odd polygon": (SEGMENTATION, annotation({"segmentation": [[1, 1, 9, 1, 9, 9, 2]]})),
    "far polygon": (SEGMENTATION, annotation({"segmentation": [[1, 1, 1e9, 1, 9, 1e9]]})),
    "runs of another size": (SEGMENTATION, annotation({"segmentation": {"size": [4, 4], "counts": [16]}})),
    "compressed runs": (SEGMENTATION, annotation({"segmentation": {"size": [55, 53], "counts": "~"}})),
    "no runs": (SEGMENTATION, annotation({"segmentation": {"size": [40, 50]}})),
    "duplicate annotation": ("duplicate annotation id", same_annotation_id),
    "duplicate image": ("duplicate image id", same_image_id),
    "no file": ("missing image file", remove_file),
    "impossible name": ("missing image file", image({"file_name": "a\0b"})),
    "endless name": ("missing image file", image({"file_name": 300 * "a"})),
    "a folder": ("missing image file", image({"file_name": "."})),
    "cut file": ("undecodable image", cut_file),
    "another file": ("image of another size", exchange_files),
    "no height": ("malformed image entry", image({"height": 0})),
    "elsewhere": ("malformed image entry", image({"file_name": "../train/x.jpg"})),
    "absolute": ("malformed image entry", image({"file_name": "/x.jpg"})),
}


@pytest.mark.parametrize(("kind", "damage"), BROKEN.values(), ids=BROKEN)
def test_each_kind_of_fault_is_named_and_only_what_is_broken_left_out(
    drawn: Drawn, kind: str, damage: Callable[[Drawn], dict[str, set[int]]]
) -> None:
    expected = drawn.without(**damage(drawn))
    if "duplicate" in kind:  # the first of two stays
        expected = {key: list({e["id"]: e for e in entries}.values()) for key, entries in expected.items()}
    drawn.save()
    with pytest.raises(ConversionError) as caught:
        drawn.convert()
    assert "\n" not in str(caught.value)
    assert f"1 broken images or annotations ({kind}: 1, first " in str(caught.value)
    assert "skip_broken" in str(caught.value)
    assert not drawn.out.exists()
    name, found, reason = report_path(drawn.out).read_text().rstrip("\n").split("\t")
    assert found == kind
    assert f"first {name}: " in str(caught.value)
    assert len(reason) > 5
    done = drawn.convert(skip_broken=True)
    assert (done.broken, done.faults) == ((name,), {kind: 1})
    assert by_id(coco_of(drawn.out)) == by_id(expected)


def test_all_faults_are_counted_also_after_the_first(drawn: Drawn) -> None:
    first, second, third = drawn.coco["annotations"][:3]
    first["bbox"] = second["bbox"] = [3, 3, 500, 5]
    third["category_id"] = 77
    drawn.coco["annotations"] += [{}, "text"]
    drawn.coco["images"] += [{"file_name": "x"}, 5]
    drawn.file(8).write_text("no image")
    drawn.file(9).unlink()
    drawn.save()
    with pytest.raises(
        ConversionError, match=r"^9 broken .*\(malformed image entry: 2, .*outside.*: 2, first"
    ):
        drawn.convert()
    kinds = [line.split("\t")[1] for line in report_path(drawn.out).read_text().splitlines()]
    done = drawn.convert(skip_broken=True)
    assert {kind: kinds.count(kind) for kind in kinds} == done.faults
    assert done.samples == 8
    assert drawn.convert(skip_broken=True) == done
    with pytest.raises(ConversionError, match="made without 9 broken images and annotations"):
        drawn.convert()


def test_coordinates_may_leave_the_image_a_little_and_annotations_share_one(drawn: Drawn) -> None:
    entry, first = drawn.coco["images"][0], drawn.coco["annotations"][0]
    right, bottom = entry["width"] + 1, entry["height"] + 1
    first["bbox"] = [-1, -1, right + 1, bottom + 1]
    first["segmentation"] = [[-9, -9, right + 9, -9, right + 9, bottom + 9], [1, 1, 2, 2, 1, 2]]
    drawn.save()
    assert drawn.convert().broken == ()


def test_nothing_but_broken_images_is_an_error_even_when_skipping(drawn: Drawn) -> None:
    for number in range(10):
        drawn.file(number).unlink()
    with pytest.raises(ConversionError, match="nothing to convert"):
        drawn.convert(skip_broken=True)
    assert not drawn.out.exists()


def test_again_nothing_is_done_and_a_changed_source_is_refused(drawn: Drawn) -> None:
    first = drawn.convert()
    stamp = (drawn.out / "index.json").stat().st_mtime_ns
    assert drawn.convert() == first
    assert (drawn.out / "index.json").stat().st_mtime_ns == stamp
    (drawn.folder / "train" / "beside.txt").write_text("no image of the set")
    assert drawn.convert() == first
    with pytest.raises(ConversionError, match="remove it"):
        drawn.convert(keep_empty=False)
    drawn.file(0).write_bytes(drawn.file(0).read_bytes() + b"\0")
    with pytest.raises(ConversionError, match="remove it"):
        drawn.convert()
    drawn.file(0).write_bytes(drawn.file(0).read_bytes()[:-1])
    drawn.coco["annotations"][0]["area"] += 1
    drawn.save()
    with pytest.raises(ConversionError, match="remove it"):
        drawn.convert()


def test_an_interruption_leaves_nothing(drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(drawn.folder.iterdir())
    written = MDSWriter.write
    counts = iter(range(100))

    def write(writer: MDSWriter, sample: dict[str, Any]) -> None:
        if next(counts) == 5:
            raise KeyboardInterrupt
        written(writer, sample)

    monkeypatch.setattr(MDSWriter, "write", write)
    with pytest.raises(KeyboardInterrupt):
        drawn.convert()
    assert set(drawn.folder.iterdir()) == before
    assert drawn.convert().samples == 10


def test_shards_do_not_depend_on_workers(drawn: Drawn) -> None:
    drawn.convert(workers=1)
    one = {path.name: path.read_bytes() for path in drawn.out.iterdir()}
    shutil.rmtree(drawn.out)
    drawn.convert(workers=3)
    assert {path.name: path.read_bytes() for path in drawn.out.iterdir()} == one


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "lacks one of the lists images, annotations, categories"),
        ('{"images": [], "categories": []}', "lacks one of the lists"),
        ('{"images": [1], "annotations": [], "categories": []}', "has no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "lists no images"),
        ('{"images": [1], "annotations": [], "categories": [{"id": 1}]}', "no name"),
        (
            '{"images": [1], "annotations": [],'
            ' "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "two categories have the id 1",
        ),
    ],
)
def test_a_file_of_another_kind_is_one_line(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConversionError, match=rf"^[^\n]*{says}[^\n]*$"):
        convert_coco(tmp_path / "a.json", tmp_path, tmp_path / "out", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json"}


def test_missing_files_and_arguments_out_of_range_are_named(drawn: Drawn) -> None:
    with pytest.raises(ConversionError, match=r"no\.json cannot be read"):
        convert_coco(drawn.folder / "no.json", drawn.folder / "train", drawn.out)
    with pytest.raises(ConversionError, match="val is not a folder"):
        convert_coco(drawn.path, drawn.folder / "val", drawn.out)
    with pytest.raises(ValueError, match="workers=0"):
        drawn.convert(workers=0)


@pytest.fixture
def aemim(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aemim", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_the_command_says_what_it_wrote_and_what_it_left_out(
    drawn: Drawn, aemim: Callable[..., tuple[int, str, str]]
) -> None:
    drawn.coco["annotations"][0]["category_id"] = 77
    drawn.save()
    arguments = ("data", "coco", drawn.path, drawn.folder / "train", drawn.out)
    code, _, err = aemim(*arguments)
    assert (code, "unknown category: 1, first annotation 100: " in err) == (1, True)
    code, out, _ = aemim(*arguments, "--skip-broken", "--drop-empty", "--workers", "1")
    assert code == 0
    counts = f"{len(drawn.coco['annotations']) - 3} objects and 2 crowds of 3 categories"
    assert f"wrote {drawn.out}: 8 images, {counts}" in out
    assert "images without objects: 0 kept, 2 left out" in out
    assert "left out 1 that are broken (unknown category: 1), named in" in out


def test_a_folder_called_coco_is_not_taken_for_the_command_silently(
    drawn: Drawn, aemim: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(drawn.folder)
    (drawn.folder / "train").rename("coco")
    code, _, err = aemim("data", "coco", "shards")
    assert (code, "Missing argument" in err) == (2, True)
    assert not Path("shards").exists()
    code, out, _ = aemim("data", "./coco", "shards")
    assert (code, "10 images of 1 classes" in out) == (0, True)
    assert "./coco" in aemim("data", "coco", "--help")[1]
