"""COCO's annotation files: reading one, and finding every fault in it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from aemim_algorithm.data.coco_masks import are_numbers, check_segmentation, is_integer
from aemim_algorithm.data.shards import ConversionError

__all__ = ["CocoFile", "FaultError", "Faults", "Listed", "list_images", "read_annotations"]

BEYOND = 1.0  # pixels by which a box may leave its image: COCO's own are rounded
LEAST_SIDE = 0.005  # pixels: half of the last digit of COCO's own coordinates


class FaultError(ValueError):
    """What is wrong with one image or annotation.

    Args:
        kind: What it is counted as.
        reason: What was found.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class CocoFile:
    """The three lists of an annotation file; images and annotations are not checked yet."""

    images: list[Any]
    annotations: list[Any]
    categories: list[dict[str, Any]]


@dataclass(frozen=True)
class Listed:
    """An image's sound entry and its sound annotations, both as they are in the file."""

    entry: dict[str, Any]
    annotations: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"image {self.entry['id']} ({self.entry['file_name']})"

    @property
    def objects(self) -> int:
        """How many annotations are no crowds: what training learns from."""
        return sum(not annotation.get("iscrowd", 0) for annotation in self.annotations)


class Faults:
    """The faults of a set by kind, and the report that names them.

    Args:
        report: The file to write; one of an earlier conversion is removed.
        tolerated: Whether the conversion goes on without what is broken.
    """

    def __init__(self, report: Path, *, tolerated: bool) -> None:
        self.report, self.tolerated = report, tolerated
        self.names: list[str] = []
        self.kinds: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._lines: list[str] = []
        report.unlink(missing_ok=True)

    def add(self, name: str, fault: FaultError) -> None:
        """Note one."""
        self.names.append(name)
        self.kinds[fault.kind] += 1
        self._first.setdefault(fault.kind, f"{name}: {fault}")
        self._lines.append(f"{' '.join(name.split())}\t{fault.kind}\t{' '.join(str(fault).split())}\n")

    def __str__(self) -> str:
        """The kinds, each with how many there are and the first one."""
        return "; ".join(f"{kind}: {count}, first {self._first[kind]}" for kind, count in self.kinds.items())

    def finish(self) -> None:
        """Write the report, if there is anything in it.

        Raises:
            ConversionError: There are faults, and they are not tolerated.
        """
        if not self.names:
            return
        self.report.write_text("".join(self._lines), encoding="utf-8", errors="backslashreplace")
        if not self.tolerated:
            raise ConversionError(
                f"{len(self.names)} broken images or annotations ({self}); all are named in {self.report}; "
                "nothing was written: mend them, or leave them out with skip_broken=True (--skip-broken)"
            )


def read_annotations(path: Path) -> CocoFile:
    """Read an annotation file, and check that it is one of COCO's `instances` kind.

    Args:
        path: The JSON file.

    Returns:
        Its images, annotations and categories.

    Raises:
        ConversionError: It cannot be read or is of another kind, or its categories are not sound.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}): give COCO's JSON file") from error
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON ({error}): give COCO's JSON file") from error
    names = tuple(CocoFile.__annotations__)
    lists: list[Any] = [content.get(name) if isinstance(content, dict) else None for name in names]
    if not all(isinstance(entries, list) for entries in lists):
        raise ConversionError(
            f"{path} lacks one of the lists {', '.join(names)}: give an instances_*.json "
            "of COCO, or one like it"
        )
    images, annotations, categories = lists
    _check_categories(path, categories)
    if not images:
        raise ConversionError(f"{path} lists no images: there is nothing to convert")
    return CocoFile(images, annotations, categories)


def _check_categories(path: Path, categories: list[Any]) -> None:
    seen = set()
    for category in categories:
        sound = isinstance(category, dict) and is_integer(category.get("id"))
        if not sound or not isinstance(category.get("name"), str):
            raise ConversionError(f"{path}: the category {category!r} has no id (an integer) or no name")
        if category["id"] in seen:
            raise ConversionError(f"{path}: two categories have the id {category['id']}: give each its own")
        seen.add(category["id"])
    if not seen:
        raise ConversionError(f"{path} has no categories: expected at least one")


def list_images(coco: CocoFile, faults: Faults) -> list[Listed]:
    """Sort the annotations to their images, and out what is broken.

    Args:
        coco: As read.
        faults: Gets what is wrong with an entry or annotation; the image files are not looked at.

    Returns:
        The sound images, in the order of the file, with their sound annotations.
    """
    listed: dict[int, Listed] = {}
    broken_images: set[int] = set()  # their annotations are left out with them, and are no faults
    for entry in coco.images:
        try:
            _check_entry(entry)
            if entry["id"] in listed:
                raise FaultError("duplicate image id", f"{entry['file_name']} has it as well")
            listed[entry["id"]] = Listed(entry, [])
        except FaultError as fault:
            identity: Any = entry.get("id") if isinstance(entry, dict) else entry
            faults.add(f"image {identity}", fault)
            if is_integer(identity):
                broken_images.add(identity)
    broken_images -= listed.keys()
    categories = {category["id"] for category in coco.categories}
    seen: set[int] = set()
    for annotation in coco.annotations:
        identity = annotation.get("image_id") if isinstance(annotation, dict) else None
        if is_integer(identity) and identity in broken_images:
            continue
        try:
            _check_annotation(annotation, listed, categories, seen)
        except FaultError as fault:
            faults.add(f"annotation {annotation.get('id') if isinstance(annotation, dict) else '?'}", fault)
        else:
            seen.add(annotation["id"])
            listed[annotation["image_id"]].annotations.append(annotation)
    return list(listed.values())


def _check_entry(entry: Any) -> None:
    """Raise `FaultError` unless an image has all that is needed to find and read it."""
    kind = "malformed image entry"
    if not isinstance(entry, dict) or not is_integer(entry.get("id")):
        raise FaultError(kind, "expected an id, an integer")
    name = entry.get("file_name")
    if not isinstance(name, str) or not name or PurePosixPath(name).is_absolute() or ".." in name.split("/"):
        raise FaultError(kind, f"file_name is {name!r}, expected a path within the folder of the images")
    if not all(is_integer(entry.get(side)) and entry[side] > 0 for side in ("height", "width")):
        raise FaultError(
            kind, f"height {entry.get('height')!r}, width {entry.get('width')!r}, expected pixels"
        )


def _check_annotation(
    annotation: Any, images: Mapping[int, Listed], categories: set[int], seen: set[int]
) -> None:
    """Raise `FaultError` unless an annotation is sound."""
    if not isinstance(annotation, dict) or not is_integer(annotation.get("id")):
        raise FaultError("malformed annotation", "expected an id, an integer")
    if annotation["id"] in seen:
        raise FaultError("duplicate annotation id", "an earlier annotation has it")
    image_id: Any = annotation.get("image_id")
    category: Any = annotation.get("category_id")
    if not is_integer(image_id) or image_id not in images:
        raise FaultError("annotation of an unknown image", f"no image has the id {image_id!r}")
    if not is_integer(category) or category not in categories:
        raise FaultError("unknown category", f"no category has the id {category!r}")
    entry = images[image_id].entry
    box: Any = annotation.get("bbox")
    if not are_numbers(box) or len(box) != 4:
        raise FaultError("malformed annotation", f"bbox is {box!r}, expected [x, y, width, height]")
    if not are_numbers([annotation.get("area")]):
        raise FaultError(
            "malformed annotation", f"area is {annotation.get('area')!r}, expected square pixels"
        )
    if annotation.get("iscrowd", 0) not in (0, 1):
        raise FaultError("malformed annotation", f"iscrowd is {annotation['iscrowd']!r}, expected 0 or 1")
    _check_box(box, annotation["area"], entry["height"], entry["width"])
    try:
        check_segmentation(annotation.get("segmentation"), entry["height"], entry["width"])
    except ValueError as error:
        raise FaultError("malformed segmentation", str(error)) from error


def _check_box(box: list[float], area: float, height: int, width: int) -> None:
    x, y, across, down = box
    if min(across, down) < LEAST_SIDE or area <= 0:
        raise FaultError("zero area", f"bbox {box}, area {area}")
    left, top, right, bottom = x, y, x + across, y + down
    beyond = max(-left, -top, right - width, bottom - height)
    seen = min(right, width) - max(left, 0), min(bottom, height) - max(top, 0)
    if beyond > BEYOND or min(seen) < LEAST_SIDE:
        raise FaultError("box outside of its image", f"bbox {box} in an image of {width}×{height} pixels")
