"""A small set of objects on photographs in COCO's layout, of which every number is known.

Triangles, rectangles and discs of one colour each, which do not touch one another, on crops of the package's
photographs. Corners of rectangles are whole pixels, so their masks are exact slices; the pixels of a triangle
or disc are those whose centres lie in its polygon, which is not how pycocotools rasterises. Some images hold
a crowd, as runs, and some hold nothing.

    python tests/drawn_coco.py FOLDER PART IMAGES      draws a set of so many images, such as runs/drawn train 240
"""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aemim_algorithm.data.photos import load_photos

SHAPES = {"disc": 9, "triangle": 2, "rectangle": 5}  # ids with gaps, as COCO's, and out of order
_DISC_CORNERS = 24
_TRIES = 30

Polygon = list[tuple[float, float]]


def draw(
    folder: Path,
    *,
    images: int = 8,
    seed: int = 0,
    part: str = "train",
    sides: tuple[int, int] = (48, 81),
    objects: int = 3,
    object_sides: tuple[int, int] = (10, 24),
    crowd_every: int = 4,
    empty_every: int = 5,
) -> dict[str, Any]:
    """Draw a set: `annotations/instances_<part>.json`, and the images in `<part>`.

    Args:
        folder: Where; made if it is missing.
        images: How many images.
        seed: Decides everything that is drawn, with `part`.
        part: Such as "train" or "val"; its crops and its objects are others.
        sides: Least and greatest height and width of an image, in pixels.
        objects: Most objects of an image, beside a crowd; each image has at least one, if there is room.
        object_sides: Least and greatest side of an object's box, in pixels.
        crowd_every: One image of so many has a crowd too; 0: none.
        empty_every: One image of so many has nothing; 0: none.

    Returns:
        What the JSON holds.
    """
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / part).mkdir(exist_ok=True)
    categories = [
        {"id": identity, "name": name, "supercategory": "shape"} for name, identity in SHAPES.items()
    ]
    coco: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    for number in range(images):
        draw_from = np.random.default_rng((seed, number, *part.encode()))
        height, width = (int(side) for side in draw_from.integers(sides[0], sides[1] + 1, 2))
        scene = _Scene(_crop(draw_from, height, width), draw_from)
        if not (empty_every and number % empty_every == empty_every - 1):
            for _ in range(int(draw_from.integers(1, objects + 1))):
                scene.add_object(object_sides)
            if crowd_every and number % crowd_every == crowd_every - 1:
                scene.add_crowd()
        image_id = 3 * number + 11
        name = f"{image_id:012}.{'png' if number % 3 == 2 else 'jpg'}"
        Image.fromarray(scene.pixels).save(folder / part / name, **({} if "png" in name else {"quality": 95}))
        coco["images"].append(
            {"id": image_id, "file_name": name, "height": height, "width": width, "license": number % 2}
        )
        for annotation in scene.annotations:
            annotation_id = 100 + 7 * len(coco["annotations"])
            coco["annotations"].append({"id": annotation_id, "image_id": image_id, **annotation})
    path = folder / "annotations" / f"instances_{part}.json"
    path.write_text(json.dumps(coco), encoding="utf-8")
    return coco


class _Scene:
    """An image that objects are added to, where they are free of one another."""

    def __init__(self, pixels: NDArray[np.uint8], draw_from: np.random.Generator) -> None:
        self.pixels, self.annotations = pixels, list[dict[str, Any]]()
        self._draw_from = draw_from
        self._taken = np.zeros(pixels.shape[:2], bool)

    def add_object(self, sides: tuple[int, int]) -> None:
        """One object of a random shape, place and colour, if there is room for it."""
        box = self._free_box(sides)
        if box is None:
            return
        name = str(self._draw_from.choice(sorted(SHAPES)))
        polygon = _polygon(name, *box)
        self._paint(inside(polygon, *self.pixels.shape[:2]))
        xs, ys = zip(*polygon, strict=True)
        self.annotations.append(
            {
                "category_id": SHAPES[name],
                "bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)],
                "area": polygon_area(polygon),
                "iscrowd": 0,
                "segmentation": [[number for point in polygon for number in point]],
            }
        )

    def add_crowd(self) -> None:
        """Up to three small discs as one crowd; its mask is exactly the pixels that are painted."""
        mask = np.zeros_like(self._taken)
        for _ in range(3):
            box = self._free_box((6, 8))
            if box is not None:
                part = inside(_polygon("disc", *box), *mask.shape)
                self._paint(part)
                mask |= part
        if mask.any():
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            left, top = int(columns[0]), int(rows[0])
            self.annotations.append(
                {
                    "category_id": SHAPES["disc"],
                    "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
                    "area": int(mask.sum()),
                    "iscrowd": 1,
                    "segmentation": {"counts": runs(mask), "size": list(mask.shape)},
                }
            )

    def _free_box(self, sides: tuple[int, int]) -> tuple[int, int, int, int] | None:
        """Left, top, width and height of a box that touches none so far, which is then taken."""
        rows, columns = self._taken.shape
        for _ in range(_TRIES):
            height, width = (int(side) for side in self._draw_from.integers(sides[0], sides[1] + 1, 2))
            if height > rows or width > columns:
                continue
            top = int(self._draw_from.integers(0, rows - height + 1))
            left = int(self._draw_from.integers(0, columns - width + 1))
            around = np.s_[max(top - 1, 0) : top + height + 1, max(left - 1, 0) : left + width + 1]
            if not self._taken[around].any():
                self._taken[around] = True
                return left, top, width, height
        return None

    def _paint(self, mask: NDArray[np.bool_]) -> None:
        self.pixels[mask] = self._draw_from.integers(0, 256, 3, dtype=np.uint8)


def inside(polygon: Polygon, height: int, width: int) -> NDArray[np.bool_]:
    """The pixels whose centres lie in a convex polygon of clockwise corners (y points down)."""
    y, x = np.mgrid[:height, :width] + 0.5
    mask = np.ones((height, width), bool)
    for (x0, y0), (x1, y1) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        mask &= (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= 0
    return mask


def polygon_area(polygon: Polygon) -> float:
    """By the shoelace formula, in square pixels."""
    pairs = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairs)) / 2


def runs(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed runs of a mask: column by column, beginning with how many are not in it."""
    flat = mask.flatten(order="F")
    edges = (np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist()
    lengths = np.diff([0, *edges, flat.size]).tolist()
    return [0, *lengths] if flat[0] else lengths


def _polygon(name: str, left: int, top: int, width: int, height: int) -> Polygon:
    right, bottom = left + width, top + height
    if name == "rectangle":
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    if name == "triangle":
        return [(left + width / 2, top), (right, bottom), (left, bottom)]
    turns = [2 * math.pi * corner / _DISC_CORNERS for corner in range(_DISC_CORNERS)]
    return [
        (
            round(left + width / 2 * (1 + math.cos(turn)), 2),
            round(top + height / 2 * (1 + math.sin(turn)), 2),
        )
        for turn in turns
    ]


def _crop(draw_from: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """A crop of one of the photographs that are large enough."""
    photos = [photo for photo in _photos() if photo.shape[0] >= height and photo.shape[1] >= width]
    photo = photos[int(draw_from.integers(len(photos)))]
    top = int(draw_from.integers(0, photo.shape[0] - height + 1))
    left = int(draw_from.integers(0, photo.shape[1] - width + 1))
    return photo[top : top + height, left : left + width].copy()


@functools.cache
def _photos() -> list[NDArray[np.uint8]]:
    return [photo.permute(1, 2, 0).numpy() for photo in load_photos().values()]


if __name__ == "__main__":
    _folder, _part, _images = sys.argv[1:]
    draw(Path(_folder), part=_part, images=int(_images))
