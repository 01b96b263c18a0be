"""Masks of COCO's segmentations: polygons and runs (RLE), and whether they can be rasterised at all.

pycocotools crashes on a polygon far outside of its image, and fills what runs do not cover with whatever the
memory held. So segmentations are checked before it, or evaluation, sees them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

__all__ = ["are_numbers", "check_segmentation", "is_integer", "masks_of", "run_lengths"]

_INT64 = 2**63
_LONGEST = 12  # characters of 5 bits: more do not fit 64 bits


def masks_of(segmentations: list[Any], height: int, width: int) -> Tensor:
    """Rasterise segmentations that `check_segmentation` has found sound.

    Args:
        segmentations: Each a list of polygons, or runs, compressed or not.
        height: Of the image, in pixels.
        width: Of the image, in pixels.

    Returns:
        Shape (segmentations, height, width), uint8, 0 or 1.
    """
    masks = np.zeros((len(segmentations), height, width), np.uint8)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        counts = _counts(segmentation, height, width)
        inside = np.arange(len(counts), dtype=np.uint8) % 2
        mask[:] = inside.repeat(counts).reshape(width, height).T  # runs go down the columns
    return torch.from_numpy(masks)


def _counts(segmentation: Any, height: int, width: int) -> Any:
    """The run lengths of a segmentation."""
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    counts = segmentation["counts"]
    return counts if isinstance(counts, list) else run_lengths(counts)


def run_lengths(counts: str | bytes) -> NDArray[np.int64] | None:
    """Read compressed runs.

    A length is a number of 5 bits a character, the lowest first, offset by 48; the 6th bit says that another
    follows, and the 5th of the last is the sign. From the fourth on they are differences to the length two
    before.

    Args:
        counts: What COCO calls by this name, compressed.

    Returns:
        The lengths, shape (runs,), of what is outside and inside in turns; None where these are no runs.
    """
    text = counts if isinstance(counts, bytes) else counts.encode()
    bits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(bits & 32 == 0)
    if bits.size == 0 or bits.min() < 0 or bits.max() >= 64 or bits[-1] & 32:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() >= _LONGEST:
        return None
    places = np.arange(bits.size) - starts.repeat(ends - starts + 1)
    numbers = np.add.reduceat((bits & 31) << 5 * places, starts)
    numbers -= (bits[ends] & 16) << 5 * (ends - starts) + 1
    for first in (1, 2):
        numbers[first::2] = numbers[first::2].cumsum()
    return numbers


def check_segmentation(segmentation: Any, height: int, width: int) -> None:
    """Raise `ValueError` unless a segmentation is one that `masks_of` and pycocotools can rasterise.

    Args:
        segmentation: As the annotation has it.
        height: Of the image, in pixels.
        width: Of the image, in pixels.

    Raises:
        ValueError: Says what is wrong with it.
    """
    if isinstance(segmentation, list) and segmentation:
        for polygon in segmentation:
            _check_polygon(polygon, height, width)
    elif isinstance(segmentation, dict):
        _check_runs(segmentation, height, width)
    else:
        found = "none" if segmentation is None else f"{segmentation!r:.40}"
        raise ValueError(f"{found}, expected polygons or runs (RLE)")


def _check_polygon(polygon: Any, height: int, width: int) -> None:
    """A polygon may leave its image, which cuts it; one that is farther off is of another scale."""
    if not are_numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"polygon {polygon!r:.40}, expected x, y, x, y, ... of at least three points")
    for side, numbers in ((width, polygon[::2]), (height, polygon[1::2])):
        if min(numbers) < -side or max(numbers) > 2 * side:
            raise ValueError(f"a polygon is far outside of its image of {width}×{height} pixels")


def _check_runs(segmentation: dict[str, Any], height: int, width: int) -> None:
    if segmentation.get("size") != [height, width]:
        found = f"{segmentation.get('size')!r:.40}"
        raise ValueError(f"runs of the size {found}, expected [height, width] {[height, width]}")
    counts: Any = segmentation.get("counts")
    if isinstance(counts, str):
        lengths = run_lengths(counts)
        counts = None if lengths is None else lengths.tolist()
    sound = isinstance(counts, list) and all(is_integer(count) and count >= 0 for count in counts)
    if not sound or sum(counts) != height * width:
        raise ValueError(f"runs that do not make up the image's {height * width} pixels")


def is_integer(value: Any) -> bool:
    """Whether it is an integer that a column of shards can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and -_INT64 <= value < _INT64


def are_numbers(values: Any) -> bool:
    """Whether it is a list of finite numbers."""
    return isinstance(values, list) and all(
        is_integer(value) or (isinstance(value, float) and math.isfinite(value)) for value in values
    )
