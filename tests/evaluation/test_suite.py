"""Running several sets: opened first, read once, what is missing is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hand_made import by_grey_level, write_grey
from torch import Tensor, nn

from aemim_algorithm.classifier import Classifier
from aemim_algorithm.evaluation.imagenet_classes import imagenet_synsets
from aemim_algorithm.evaluation.suite import evaluate_sets, open_sets, skipped_sets

SYNSETS = imagenet_synsets()


def test_missing_sets_are_named_with_the_reason(tmp_path: Path) -> None:
    reasons = skipped_sets({"a": None, "r": str(tmp_path / "none"), "clean": str(tmp_path)})
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "index.json").write_text("{}")
    unnamed = skipped_sets({"real": str(shards), "imagenet": str(shards)})
    assert list(unnamed) == ["real"]
    assert "hold no file names" in unnamed["real"]
    assert reasons == {"a": "not given", "r": f"{tmp_path / 'none'} does not exist"}


def test_imagenet_and_real_of_one_folder_are_read_once(tmp_path: Path) -> None:
    """Images 1 (no real label), 2 (970, 795) and 4 (809); class folders give the labels of ImageNet."""
    levels = {
        f"{SYNSETS[970]}/ILSVRC2012_val_00000002.JPEG": 20,
        f"{SYNSETS[809]}/ILSVRC2012_val_00000004.JPEG": 40,
    }
    source = str(write_grey(tmp_path, levels | {f"{SYNSETS[1]}/ILSVRC2012_val_00000001.JPEG": 10}))
    classifier = by_grey_level({10: {1: 9.0}, 20: {795: 9.0}, 40: {809: 9.0}})
    rows, timings = evaluate_sets(open_sets(classifier, {"imagenet": source, "real": source}))
    top1 = {row["set"]: (row["correct"], row["n"]) for row in rows if row["metric"] == "top1"}
    assert top1 == {"imagenet": (2, 3), "real": (2, 2)}
    assert list(timings) == ["imagenet+real"]
    assert timings["imagenet+real"].images == 3
    apart = open_sets(classifier, {"real": source})
    assert [row["correct"] for row in evaluate_sets(apart)[0]] == [2, 2]


def test_two_sets_in_one_folder_are_not_mixed_up(tmp_path: Path) -> None:
    """-A masked and ImageNet unmasked, though the images are the same."""
    source = str(write_grey(tmp_path, {f"{SYNSETS[6]}/x.png": 10}))
    classifier = by_grey_level({10: {0: 9.0, 6: 5.0}})  # class 0 is not one of -A's
    rows, timings = evaluate_sets(open_sets(classifier, {"imagenet": source, "a": source}))
    assert {row["set"]: row["value"] for row in rows if row["metric"] == "top1"} == {
        "imagenet": 0.0,
        "a": 100.0,
    }
    assert list(timings) == ["imagenet", "a"]


def test_a_list_of_images_holds_for_the_validation_set_only(tmp_path: Path) -> None:
    val = write_grey(tmp_path / "val", {f"{SYNSETS[6]}/1.png": 10, f"{SYNSETS[6]}/2.png": 20})
    other = write_grey(tmp_path / "a", {f"{SYNSETS[6]}/7.png": 10})
    opened = open_sets(by_grey_level({}), {"imagenet": str(val), "a": str(other)}, only=["2.png"])
    assert {name: list(images.ids) for name, images in opened.images.items()} == {
        "imagenet": [f"{SYNSETS[6]}/2.png"],
        "a": [f"{SYNSETS[6]}/7.png"],
    }


def test_a_wrong_set_is_found_before_the_first_one_is_run(tmp_path: Path) -> None:
    class NeverRun(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise AssertionError("a set was run")

    classifier = Classifier(model=NeverRun(), image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, classes=SYNSETS)
    good = write_grey(tmp_path / "good", {f"{SYNSETS[6]}/1.png": 10})
    wrong = write_grey(tmp_path / "wrong", {"tench/1.png": 10})
    with pytest.raises(ValueError, match="first 'tench'"):
        evaluate_sets(open_sets(classifier, {"imagenet": str(good), "sketch": str(wrong)}))


def test_a_classifier_without_names_takes_those_of_the_set(tmp_path: Path) -> None:
    source = str(write_grey(tmp_path, {"b/1.png": 10, "a/1.png": 20}))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([0.0, 1.0]))  # always "b"
    unnamed = Classifier(model=model, image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, classes=None)
    opened = open_sets(unnamed, {"clean": source})
    assert opened.classifier.classes == ("a", "b")
    assert evaluate_sets(opened)[0][0]["correct"] == 1
    three = Classifier(
        model=nn.Sequential(nn.Flatten(), nn.Linear(192, 3)),
        image_size=8,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        classes=None,
    )
    with pytest.raises(ValueError, match=r"got logits of shape \(2, 3\), expected \(2, 2\)"):
        evaluate_sets(open_sets(three, {"clean": source}))


def test_what_is_through_is_told_before_the_next_set_is_read(tmp_path: Path) -> None:
    good = write_grey(tmp_path / "good", {f"{SYNSETS[6]}/1.png": 10})
    broken = write_grey(tmp_path / "broken", {f"{SYNSETS[6]}/1.png": 10})
    (broken / SYNSETS[6] / "1.png").write_bytes(b"\x89PNG no picture")
    opened = open_sets(by_grey_level({}), {"imagenet": str(good), "a": str(broken)})
    told: list[str] = []
    with pytest.raises(ValueError, match="1.png"):
        evaluate_sets(opened, finished=lambda rows, timings: told.extend([row["set"] for row in rows]))
    assert told == ["imagenet", "imagenet"]  # top-1 and top-5
