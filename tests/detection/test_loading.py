"""Batches of images with objects: every image once an epoch, in an order that processes do not change."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_coco import draw
from torch import Tensor

from aemim_algorithm.data.coco import convert_coco
from aemim_algorithm.data.detection_images import DetectionImages
from aemim_algorithm.detection import loading
from aemim_algorithm.detection.loading import (
    GlobalBatches,
    TrainingObjects,
    mirrored,
    scoring_objects,
    training_objects,
)


class Sized:
    """As many sizes as images, without any."""

    def __init__(self, wide: int, tall: int) -> None:
        self.sizes = [(30, 40)] * wide + [(40, 30)] * tall

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image = torch.full((3, *self.sizes[index]), index, dtype=torch.uint8)
        image[:, :, 0] = 255
        return image, {"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, *self.sizes[index])}


def batches_of(
    images: Any, *, epoch: int = 0, given: int = 0, ranks: int = 1, size: int = 4
) -> list[list[tuple[int, int]]]:
    """The global batches, put together from what each process reads."""
    parts = []
    for rank in range(ranks):
        objects = TrainingObjects(images, seed=3)
        objects.load_state_dict({"samples_in_epoch": given})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loading.dist, "get_world_size", lambda: ranks)
            patch.setattr(loading.dist, "get_global_rank", lambda rank=rank: rank)
            sampler = GlobalBatches(objects, batch_size=size // ranks, seed=3)
        sampler.set_epoch(epoch)
        parts.append([*sampler])
    return [[*chain(*batch)] for batch in zip(*parts, strict=True)]


def test_every_image_is_there_once_an_epoch_and_each_epoch_has_its_order() -> None:
    images = Sized(13, 9)  # 22: five batches of four
    seen = [batches_of(images, epoch=epoch) for epoch in (0, 1)]
    for epoch, batches in enumerate(seen):
        assert [len(batch) for batch in batches] == [4] * 5
        drawn = Counter(index for batch in batches for _, index in batch)
        assert set(drawn.values()) == {1}
        assert {number for batch in batches for number, _ in batch} == {epoch}
    assert [[index for _, index in batch] for batch in seen[0]] != [
        [index for _, index in batch] for batch in seen[1]
    ]
    assert batches_of(images) == seen[0]


def test_wide_and_tall_images_share_no_more_batches_than_they_must() -> None:
    for epoch in range(4):
        batches = batches_of(Sized(13, 9), epoch=epoch)
        kinds = [{index < 13 for _, index in batch} for batch in batches]
        assert sum(len(kind) == 2 for kind in kinds) <= 1
        assert {True} in kinds
        assert {False} in kinds


def test_processes_and_resuming_change_no_batch() -> None:
    images = Sized(13, 9)
    whole = batches_of(images, epoch=2)
    assert batches_of(images, epoch=2, ranks=2) == whole
    assert batches_of(images, epoch=2, given=12) == whole[3:]
    assert batches_of(images, epoch=2, given=12, ranks=4) == whole[3:]
    assert batches_of(images, epoch=2, given=20) == []


def test_an_epoch_after_a_resumed_one_is_whole() -> None:
    objects = TrainingObjects(Sized(13, 9), seed=3)  # type: ignore[arg-type]
    objects.load_state_dict(objects.state_dict(12, True))
    sampler = GlobalBatches(objects, batch_size=4, seed=3)
    assert (len([*sampler]), len([*sampler]), len(sampler)) == (2, 5, 5)


def test_fewer_images_than_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="3 images with objects, fewer than the 4 of a global batch"):
        batches_of(Sized(3, 0))


def test_half_of_the_images_are_mirrored_and_not_the_same_ones_in_each_epoch() -> None:
    objects = TrainingObjects(Sized(200, 0), seed=3)  # type: ignore[arg-type]
    flips = [[bool(objects[epoch, index][0][0, 0, -1] == 255) for index in range(200)] for epoch in (0, 1)]
    for flipped in flips:
        assert 70 < sum(flipped) < 130
    assert 60 < sum(one != other for one, other in zip(*flips, strict=True)) < 140
    again = TrainingObjects(Sized(200, 0), seed=3)  # type: ignore[arg-type]
    assert [bool(again[1, index][0][0, 0, -1] == 255) for index in range(200)] == flips[1]


def test_boxes_and_masks_are_mirrored_with_their_image() -> None:
    image = torch.arange(3 * 4 * 6).reshape(3, 4, 6).byte()
    mask = torch.zeros(1, 4, 6, dtype=torch.uint8)
    mask[0, 1:3, 1:4] = 1
    target = {"boxes": torch.tensor([[1.0, 1.0, 4.0, 3.0]]), "masks": mask, "labels": torch.tensor([2])}
    flipped, found = mirrored(image, target)
    assert found["boxes"].tolist() == [[2.0, 1.0, 5.0, 3.0]]
    rows, columns = found["masks"][0].nonzero().T
    assert (int(columns.min()), int(columns.max()) + 1, int(rows.min()), int(rows.max()) + 1) == (2, 5, 1, 3)
    assert torch.equal(flipped[:, 1:3, 2:5].flip(-1), image[:, 1:3, 1:4])
    twice, back = mirrored(flipped, found)
    assert torch.equal(twice, image)
    assert all(torch.equal(back[key], value) for key, value in target.items())
    assert target["boxes"].tolist() == [[1.0, 1.0, 4.0, 3.0]]  # not in place


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    draw(folder, images=10)
    convert_coco(folder / "annotations" / "instances_train.json", folder / "train", folder / "shards")
    return folder / "shards"


def test_training_leaves_out_crowds_and_empty_images_and_evaluation_does_not(shards: Path) -> None:
    images = DetectionImages(shards, train=True)
    spec = training_objects(images, batch_size=2, seed=0)
    assert (len(images), spec.num_samples) == (8, 8)
    seen = [target for batch in spec.dataloader for target in batch["target"]]
    assert all(len(target["boxes"]) and not target["crowd"].any() for target in seen)
    every = [
        target
        for batch in scoring_objects(DetectionImages(shards), batch_size=3).dataloader
        for target in batch["target"]
    ]
    assert len(every) == 10
    assert [target["image_id"] for target in every] == [image["id"] for image in _as_stored(shards)]
    assert sum(len(target["boxes"]) == 0 for target in every) == 2
    assert any(target["crowd"].any() for target in every)


def _as_stored(shards: Path) -> list[dict[str, Any]]:
    images = DetectionImages(shards)
    return [{"id": images[index][1]["image_id"]} for index in range(len(images))]


def test_batches_are_split_and_counted_as_lists(shards: Path) -> None:
    spec = scoring_objects(DetectionImages(shards), batch_size=5)
    batch = next(iter(spec.dataloader))
    assert spec.get_num_samples_in_batch(batch) == 5
    parts = spec.split_batch(batch, 2)
    assert [spec.get_num_samples_in_batch(part) for part in parts] == [2, 2, 1]
    assert [image for part in parts for image in part["image"]] == batch["image"]
    assert [target for part in parts for target in part["target"]] == batch["target"]


def test_workers_change_nothing(shards: Path) -> None:
    images = DetectionImages(shards, train=True)
    alone, helped = (
        [*training_objects(images, batch_size=2, seed=0, workers=workers).dataloader] for workers in (0, 2)
    )
    assert len(alone) == len(helped) == 4
    for one, other in zip(alone, helped, strict=True):
        for key in ("image", "target"):
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
