from __future__ import annotations

import numpy as np
import pytest
import torch
from drawn_coco import runs
from pycocotools import mask as coco_mask

from aemim_algorithm.data.coco_masks import check_segmentation, masks_of, run_lengths


def compressed(mask: np.ndarray) -> str:
    text: bytes = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    return text.decode()


@pytest.mark.parametrize("share", [0.0, 0.002, 0.3, 0.9, 1.0])
def test_runs_are_read_as_pycocotools_writes_them(share: float) -> None:
    """Small and large lengths, growing and shrinking ones."""
    mask = np.random.default_rng(0).random((170, 190)) < share
    text = compressed(mask)
    lengths = run_lengths(text)
    assert lengths is not None
    assert lengths.tolist() == runs(mask)
    for counts in (text, runs(mask)):
        segmentation = {"size": [170, 190], "counts": counts}
        check_segmentation(segmentation, 170, 190)
        assert np.array_equal(masks_of([segmentation], 170, 190)[0], mask)


@pytest.mark.parametrize("text", ["", "o", "1o", "é", "~", " ", "1" + 13 * "o" + "1"])
def test_what_is_no_runs_is_none(text: str) -> None:
    assert run_lengths(text) is None
    with pytest.raises(ValueError, match="do not make up"):
        check_segmentation({"size": [2, 3], "counts": text}, 2, 3)


@pytest.mark.parametrize(
    "counts", [[1, 4], [1, 6], [7, -1], [1.0, 5], [True, 5], 6, None, [2**70, 6 - 2**70]]
)
def test_runs_that_are_not_the_image_are_refused(counts: object) -> None:
    with pytest.raises(ValueError, match="do not make up the image's 6 pixels"):
        check_segmentation({"size": [2, 3], "counts": counts}, 2, 3)


def test_polygons_of_parts_are_one_mask() -> None:
    parts = [[1, 1, 4, 1, 4, 3, 1, 3], [6, 5, 9, 5, 9, 8, 6, 8], [3, 2, 7, 2, 7, 3, 3, 3]]
    expected = torch.zeros(1, 10, 12, dtype=torch.uint8)
    for left, top, _, _, right, bottom, _, _ in parts:
        expected[0, top:bottom, left:right] = 1
    assert masks_of([parts], 10, 12).equal(expected)


def test_a_polygon_is_cut_where_its_image_ends() -> None:
    around = [-12.0, -10.0, 24.0, -10.0, 24.0, 20.0, -12.0, 20.0]  # at most that far
    check_segmentation([around], 10, 12)
    assert masks_of([[around]], 10, 12).all()
    for place, beyond in ((0, -12.1), (1, -10.1), (4, 24.1), (5, 20.1)):
        with pytest.raises(ValueError, match="far outside of its image of 12×10 pixels"):
            check_segmentation([[*around[:place], beyond, *around[place + 1 :]]], 10, 12)


def test_no_segmentations_are_no_masks() -> None:
    assert masks_of([], 10, 12).shape == (0, 10, 12)
