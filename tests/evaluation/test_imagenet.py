"""ImageNet's variants, on hand-made folders whose scores are known."""

from __future__ import annotations

import json
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_made import by_grey_level, write_grey
from torch import nn

from aemim_algorithm.classifier import Classifier
from aemim_algorithm.evaluation.imagenet import SETS, SetScore, open_set
from aemim_algorithm.evaluation.imagenet_classes import (
    RealLabels,
    imagenet_lemmas,
    imagenet_synsets,
    subset_indices,
)
from aemim_algorithm.evaluation.predict import predict

SYNSETS = imagenet_synsets()


def _scores(name: str, source: Path, classifier: Classifier) -> dict[str, dict[str, Any]]:
    images = open_set(name, source, classifier)
    score = SetScore(name, classifier, images)
    for batch in predict(classifier, images, batch_size=3):
        score.add(*batch)
    return {row["metric"]: row for row in score.results()}


def _shuffled(classifier_classes: tuple[str, ...] = SYNSETS) -> tuple[str, ...]:
    order = torch.randperm(len(classifier_classes), generator=torch.Generator().manual_seed(0))
    return tuple(classifier_classes[i] for i in order.tolist())


@pytest.mark.parametrize("name", ["a", "r"])
def test_masked_and_unmasked_accuracy_differ(name: str, tmp_path: Path) -> None:
    """A class that the set does not have is the best of all 1,000, but not one that can be answered."""
    inside = subset_indices(name, SYNSETS).tolist()
    outside = next(label for label in range(1000) if label not in inside)
    right, other = inside[3], inside[7]
    # grey level 10: wrong only if the outside class counts; 20: wrong anyway
    table = {10: {outside: 9.0, right: 5.0}, 20: {outside: 9.0, right: 1.0, other: 5.0}}
    source = write_grey(tmp_path, {f"{SYNSETS[right]}/1.png": 10, f"{SYNSETS[right]}/2.png": 20})
    row = _scores(name, source, by_grey_level(table))["top1"]
    assert (row["value"], row["n"], row["correct"]) == (50.0, 2, 1)
    assert _scores("imagenet", source, by_grey_level(table))["top1"]["value"] == 0.0


@pytest.mark.parametrize("name", ["a", "r"])
def test_the_200_classes_are_timms_in_any_order_of_the_classifier(name: str) -> None:
    listed = [
        int(line)
        for line in files("timm.data").joinpath(f"_info/imagenet_{name}_indices.txt").read_text().split()
    ]
    assert subset_indices(name, SYNSETS).tolist() == listed
    order = _shuffled()
    assert {order[i] for i in subset_indices(name, order).tolist()} == {SYNSETS[i] for i in listed}


def test_real_accepts_any_label_and_leaves_out_images_without(tmp_path: Path) -> None:
    """Of timm's list: image 1 has no label, image 2 has two (970, 795), image 4 has one (809)."""
    labels = json.loads(files("timm.data").joinpath("_info/imagenet_real_labels.json").read_text())
    assert (labels[0], labels[1], labels[3]) == ([], [970, 795], [809])
    names = {1: 10, 2: 20, 3: 30, 4: 40}
    source = write_grey(
        tmp_path, {f"ILSVRC2012_val_{number:08d}.JPEG": level for number, level in names.items()}
    )
    # second label of 2 is right; 3 (230, 231) is wrong, right among five; 4 is right
    table = {10: {0: 9.0}, 20: {795: 9.0}, 30: {5: 9.0, 231: 8.0}, 40: {809: 9.0}}
    rows = _scores("real", source, by_grey_level(table))
    assert (rows["top1"]["correct"], rows["top1"]["n"]) == (2, 3)
    assert (rows["top5"]["correct"], rows["top5"]["n"]) == (3, 3)
    moved = [SYNSETS[(i + 1) % 1000] for i in range(1000)]  # class i is the classifier's i - 1
    shifted = {level: {label - 1: value for label, value in row.items()} for level, row in table.items()}
    assert _scores("real", source, by_grey_level(shifted, moved))["top1"]["correct"] == 2


def test_real_counts_as_many_images_as_the_paper_has() -> None:
    real = RealLabels(SYNSETS)
    counted = sum(bool(real.of(f"val/ILSVRC2012_val_{number:08d}.JPEG")) for number in range(1, 50_001))
    assert counted == SETS["real"].images


@pytest.mark.parametrize(
    "name", ["holiday.JPEG", "ILSVRC2012_val_00050001.JPEG", "ILSVRC2012_val_00000000.JPEG"]
)
def test_real_refuses_what_is_no_validation_image(name: str, tmp_path: Path) -> None:
    source = write_grey(tmp_path, {name: 1})
    with pytest.raises(ValueError, match="is no image of ImageNet's validation set"):
        _scores("real", source, by_grey_level({}))


def test_v2_folders_are_numbers_and_not_sorted_as_text(tmp_path: Path) -> None:
    """In text order the folders 0, 1, 10, 2 would be labelled 0, 1, 2, 3."""
    levels = {0: 10, 1: 20, 2: 30, 10: 40}
    table = {level: {label: 9.0} for label, level in levels.items()}
    numbers = write_grey(tmp_path / "numbers", {f"{label}/x.png": level for label, level in levels.items()})
    synsets = write_grey(
        tmp_path / "synsets", {f"{SYNSETS[label]}/x.png": level for label, level in levels.items()}
    )
    for source in (numbers, synsets):
        assert _scores("v2", source, by_grey_level(table))["top1"]["value"] == 100.0
    with pytest.raises(ValueError, match="class names are none of the classifier's 1000, first '0'"):
        open_set("imagenet", numbers, by_grey_level(table))


def test_a_random_classifier_is_at_chance(tmp_path: Path) -> None:
    """Four of ten classes, 80 images: the interval holds 10%."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    classes = tuple("abcdefghij")
    classifier = Classifier(model=model, image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, classes=classes)
    names = {f"{classes[i % 10]}/{i}.png": (7 * i) % 256 for i in range(80)}
    row = _scores("clean", write_grey(tmp_path, names), classifier)["top1"]
    assert row["low"] <= 10.0 <= row["high"]
    assert row["n"] == 80


def test_another_data_sets_classifier_is_refused(tmp_path: Path) -> None:
    write_grey(tmp_path, {"n01440764/1.png": 1})
    with pytest.raises(
        ValueError, match=r"sets.v2: .* lacks 1000 of ImageNet's 1,000 classes: .* sets.clean"
    ):
        open_set("v2", tmp_path, by_grey_level({}, classes=("cat", "dog")))


def test_lemmas_are_in_the_labels_order() -> None:
    assert imagenet_lemmas()[0].startswith("tench")
    assert imagenet_lemmas()[999].startswith("toilet tissue")
    assert max(Counter(SYNSETS).values()) == 1


@pytest.mark.parametrize("name", ["a", "r"])
def test_another_set_than_a_or_r_is_refused_instead_of_scored_zero(name: str, tmp_path: Path) -> None:
    source = write_grey(tmp_path, {f"{SYNSETS[0]}/1.png": 1, f"{SYNSETS[6]}/1.png": 1})  # 0 is in neither
    with pytest.raises(
        ValueError, match=f"sets.{name}: .* 1 of its 2 class.* ImageNet-{name.upper()}.*n01440764"
    ):
        open_set(name, source, by_grey_level({}))


def test_top5_of_five_classes_says_nothing_and_is_left_out(tmp_path: Path) -> None:
    for count in (5, 6):
        classes = tuple("abcdef")[:count]
        source = write_grey(tmp_path / str(count), {f"{one}/1.png": 9 for one in classes})
        assert ("top5" in _scores("clean", source, by_grey_level({}, classes))) == (count == 6)
