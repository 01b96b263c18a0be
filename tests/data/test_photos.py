from __future__ import annotations

import filecmp
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import LocalDataset

from aemim_algorithm.data.photos import PHOTOS, crop_boxes, load_photos, write_photos
from aemim_algorithm.data.streaming import class_names, evaluation_data
from aemim_algorithm.data.transforms import decode

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def test_training_and_test_crops_share_no_pixel_and_stay_inside() -> None:
    generator = np.random.default_rng(0)
    for photo in load_photos().values():
        _, height, width = photo.shape
        seen = {part: np.zeros((height, width), bool) for part in ("train", "test")}
        for part, mask in seen.items():
            for top, left, side in crop_boxes(height, width, part=part, crops=500, generator=generator):
                assert top >= 0
                assert left >= 0
                assert mask[top : top + side, left : left + side].shape == (side, side)
                mask[top : top + side, left : left + side] = True
        assert not (seen["train"] & seen["test"]).any()
        assert np.flatnonzero(seen["train"].any(0)).max() < 0.6 * width
        assert np.flatnonzero(seen["test"].any(0)).min() >= int(0.6 * width)
        # Neither part is confined to a corner of its region.
        assert seen["train"].any(0).sum() > 0.5 * width
        assert seen["test"].any(0).sum() > 0.35 * width


def test_the_photographs_are_nineteen_distinct_ones() -> None:
    photos = load_photos()
    assert len(photos) == len(PHOTOS) == 19
    assert len({photo.numpy().tobytes() for photo in photos.values()}) == 19
    assert {photo.dtype for photo in photos.values()} == {torch.uint8}
    grey = photos["camera"]
    assert grey[0].equal(grey[1])
    assert grey[0].equal(grey[2])


def test_shards_hold_the_crops_asked_for(tmp_path: Path) -> None:
    train, test = write_photos(tmp_path / "photos", size=24, train_crops=3, test_crops=2)
    assert (train.samples, test.samples) == (57, 38)
    assert train.classes == test.classes == tuple(load_photos())
    for part, crops in (("train", 3), ("test", 2)):
        samples = LocalDataset(str(tmp_path / "photos" / part))[:]
        assert Counter(int(sample["label"]) for sample in samples) == dict.fromkeys(range(19), crops)
        assert {decode(sample["image"]).shape for sample in samples} == {(3, 24, 24)}
    assert class_names(tmp_path / "photos" / "test") == list(test.classes)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_crop_at_its_own_size_is_verbatim(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", size=64, train_crops=1, test_crops=1)
    images, labels = next(iter(evaluation_data(tmp_path / "photos/train", image_size=64, batch_size=19)))
    name = "astronaut"
    photo = load_photos()[name]
    crop = images[labels == list(load_photos()).index(name)][0]
    windows = photo[:, :, : photo.shape[2] * 6 // 10].unfold(1, 64, 1).unfold(2, 64, 1)
    corners = (windows[:, :, :, 0, 0] == crop[:, 0, 0, None, None]).all(0).nonzero()
    assert any(windows[:, y, x].equal(crop) for y, x in corners.tolist())


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_photos(tmp_path / name, size=8, train_crops=2, test_crops=1, seed=seed)
    shard = "train/shard.00000.mds"
    assert filecmp.cmp(tmp_path / "a" / shard, tmp_path / "b" / shard, shallow=False)
    assert not filecmp.cmp(tmp_path / "a" / shard, tmp_path / "c" / shard, shallow=False)


def test_writing_again_does_nothing_and_other_options_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "photos"
    first = write_photos(out, size=8, train_crops=1, test_crops=1)
    stamp = (out / "train/index.json").stat().st_mtime_ns
    assert write_photos(out, size=8, train_crops=1, test_crops=1) == first
    assert (out / "train/index.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="remove it"):
        write_photos(out, size=9, train_crops=1, test_crops=1)
    (out / "test").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="not empty"):
        write_photos(out, size=8, train_crops=1, test_crops=1)


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("aemim_algorithm.data.photos.encode_png", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_photos(tmp_path / "photos")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value"), [("size", 7), ("train_crops", 0), ("test_crops", -1), ("seed", -1)]
)
def test_arguments_out_of_range_are_named(option: str, value: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=option):
        write_photos(tmp_path / "photos", **{option: value})
    assert list(tmp_path.iterdir()) == []


def test_a_scikit_image_without_photographs_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aemim_algorithm.data.photos.PHOTOS", ("unknown.png",))
    with pytest.raises(ValueError, match=r"lacks unknown\.png"):
        write_photos(tmp_path / "photos")
    assert list(tmp_path.iterdir()) == []
