"""Turn COCO's folder layout into MDS shards: image files as they are, with their annotations as JSON.

Everything is checked before anything is written: what would crash the decoder of masks, train on nonsense or
make an average precision wrong is named and counted by kind.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from streaming.base.hashing import get_hash
from tqdm import tqdm

from aemim_algorithm.data.coco_annotations import (
    CocoFile,
    FaultError,
    Faults,
    Listed,
    list_images,
    read_annotations,
)
from aemim_algorithm.data.convert import ordered_map, report_path
from aemim_algorithm.data.shards import (
    DESCRIPTION,
    HASH,
    ConversionError,
    check_space,
    describe,
    existing,
    staged,
    write_samples,
)
from aemim_algorithm.data.transforms import decode
from aemim_algorithm.validation import require_integer

__all__ = ["COLUMNS", "SUMMARY", "CocoConversion", "convert_coco"]

COLUMNS = {
    "image": "bytes",  # the file as it is
    "image_id": "int",
    "file_name": "str",
    "height": "int",
    "width": "int",
    "annotations": "bytes",  # JSON: a list, each as in the annotation file
    "more": "bytes",  # JSON: what else the annotation file has of the image
}
SUMMARY = "samples.npy"  # of each sample height, width and number of objects: what needs no image to be read
_OWN_COLUMNS = {"id": "image_id", "file_name": "file_name", "height": "height", "width": "width"}


@dataclass(frozen=True)
class CocoConversion:
    """What a folder of shards holds.

    Attributes:
        samples: Number of images.
        annotations: Number of annotations, crowds among them.
        crowds: Number of annotations that are crowds.
        empty: Number of images without objects; those with nothing but crowds are among them.
        classes: Names of the categories, in the order of their ids; a label is a position in them, from 1 on.
        objects: Objects of each class that are not crowds.
        dropped: Number of images left out because they are empty.
        broken: Names of the images and annotations left out because they are broken.
        faults: What is wrong with those: kinds, and how many are of each.
    """

    samples: int
    annotations: int
    crowds: int
    empty: int
    classes: tuple[str, ...]
    objects: tuple[int, ...]
    dropped: int
    broken: tuple[str, ...]
    faults: dict[str, int]


def convert_coco(
    annotations: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    skip_broken: bool = False,
    keep_empty: bool = True,
    workers: int | None = None,
    progress: bool = True,
) -> CocoConversion:
    """Write COCO's images and annotations as MDS shards, all or none, in the order of the annotation file.

    Args:
        annotations: A JSON file such as `annotations/instances_train2017.json`.
        images: The folder that its file names are in, such as `train2017`.
        out: The folder to make. Where it already holds just this conversion, nothing is done.
        skip_broken: Leave out broken annotations, and broken images with theirs, instead of failing.
        keep_empty: Also write images without objects. Training leaves them out, evaluation needs them.
        workers: Threads that read and decode; None: one per core.
        progress: Show a progress bar on stderr.

    Returns:
        What was written, and what was left out.

    Raises:
        ConversionError: The annotation file is not COCO's; images or annotations are broken (all named in
            `<out>.broken.txt`); nothing is left to convert; something else is at `out`; the disk is full.
    """
    if workers is not None:
        require_integer("workers", workers, low=1)
    annotations, images, out = Path(annotations), Path(images), Path(out)
    if not images.is_dir():
        raise ConversionError(f"{images} is not a folder: give the one that the annotations' images are in")
    coco = read_annotations(annotations)
    sizes = _file_sizes(coco, images)
    made_from = {
        "source": annotations.name,
        "hash": get_hash(HASH, annotations.read_bytes()),
        "images": images.resolve().name,
        "files": len(sizes),
        "bytes": sum(sizes),
        "keep_empty": keep_empty,
    }
    if existing(out, made_from) is not None:
        done = _described(out)
        if done.broken and not skip_broken:
            raise ConversionError(
                f"{out} was made without {len(done.broken)} broken images and annotations: "
                "remove it or pass skip_broken"
            )
        return done
    faults = Faults(report_path(out), tolerated=skip_broken)
    listed = list_images(coco, faults)
    with staged(out) as stage:
        check_space(out, sum(sizes))
        sound = _readable(listed, images, workers or os.cpu_count() or 1, progress, faults)
        written, dropped = _write(sound, stage, keep_empty=keep_empty)
        faults.finish()
        if not written:
            raise ConversionError(f"{annotations}: no image is left: there is nothing to convert")
        _describe(stage, coco, written, faults, made_from, dropped=dropped)
    return _described(out)


def _file_sizes(coco: CocoFile, folder: Path) -> list[int]:
    """Bytes of the images' files that there are."""
    sizes = []
    for entry in coco.images:
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if isinstance(name, str):
            with suppress(OSError, ValueError):  # a name that no file can have is reported with the others
                path = folder / name
                sizes += [path.stat().st_size] if path.is_file() else []
    return sizes


def _readable(
    listed: list[Listed], folder: Path, workers: int, progress: bool, faults: Faults
) -> Iterator[tuple[Listed, bytes]]:
    """Read and check the image files in threads; give those that may be written, in order."""

    def read(image: Listed) -> bytes | FaultError:
        try:
            return _read(folder / image.entry["file_name"], image.entry)
        except FaultError as fault:
            return fault

    bar = tqdm(listed, "converting", unit="img", file=sys.stderr, disable=not progress)
    for image, result in zip(bar, ordered_map(read, listed, workers), strict=True):
        if isinstance(result, FaultError):
            faults.add(image.name, result)
        # Once the conversion has failed, go on to name every broken image, but write no more.
        elif faults.tolerated or not faults.names:
            yield image, result


def _read(path: Path, entry: dict[str, Any]) -> bytes:
    """The bytes of an image file that can be decoded and has the size that the annotations are for."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # the latter: a name that no file can have
        raise FaultError("missing image file", getattr(error, "strerror", None) or str(error)) from error
    try:
        _, height, width = decode(data).shape
    except ValueError as error:
        raise FaultError("undecodable image", str(error)) from error
    if (height, width) != (entry["height"], entry["width"]):
        expected = f"{entry['width']}×{entry['height']} in the annotation file"
        raise FaultError("image of another size", f"{width}×{height} pixels, {expected}")
    return data


def _write(
    samples: Iterable[tuple[Listed, bytes]], folder: Path, *, keep_empty: bool
) -> tuple[list[Listed], int]:
    """Write the shards and their summary; returns what is in them, and how many were empty and dropped."""
    written: list[Listed] = []
    dropped = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal dropped
        for image, data in samples:
            if not (keep_empty or image.objects):
                dropped += 1
                continue
            more = {key: value for key, value in image.entry.items() if key not in _OWN_COLUMNS}
            columns = {column: image.entry[key] for key, column in _OWN_COLUMNS.items()}
            written.append(image)
            yield {"image": data, "annotations": _json(image.annotations), "more": _json(more), **columns}

    write_samples(rows(), folder, columns=COLUMNS)
    summary = [(image.entry["height"], image.entry["width"], image.objects) for image in written]
    np.save(folder / SUMMARY, np.array(summary, np.int32).reshape(-1, 3))
    return written, dropped


def _describe(
    folder: Path,
    coco: CocoFile,
    written: list[Listed],
    faults: Faults,
    made_from: dict[str, Any],
    *,
    dropped: int,
) -> None:
    """Write what the shards hold beside them."""
    categories = sorted(coco.categories, key=lambda category: category["id"])
    counts: Counter[tuple[int, bool]] = Counter(
        (annotation["category_id"], bool(annotation.get("iscrowd", 0)))
        for image in written
        for annotation in image.annotations
    )
    conversion = CocoConversion(
        samples=len(written),
        annotations=counts.total(),
        crowds=sum(count for (_, crowd), count in counts.items() if crowd),
        empty=sum(not image.objects for image in written),
        classes=tuple(category["name"] for category in categories),
        objects=tuple(counts[category["id"], False] for category in categories),
        dropped=dropped,
        broken=tuple(faults.names),
        faults=dict(faults.kinds),
    )
    describe(folder, {"made_from": made_from, **asdict(conversion), "categories": categories})


def _described(folder: Path) -> CocoConversion:
    """What `_describe` wrote."""
    description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    values = {key: description[key] for key in CocoConversion.__annotations__}
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return CocoConversion(**{**values, **lists})


def _json(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
