"""Corrupted sets on which the right answers are known, official folders among them."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hand_made import by_grey_level
from PIL import Image
from torch import Tensor

from aemim_algorithm.evaluation import corruption_suite
from aemim_algorithm.evaluation.corruption_baseline import check_baseline, errors_of
from aemim_algorithm.evaluation.corruption_error import ALEXNET_ERRORS
from aemim_algorithm.evaluation.corruption_suite import (
    evaluate_corruptions,
    evaluate_imagenet_c,
)
from aemim_algorithm.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from aemim_algorithm.evaluation.imagenet_c import (
    check_classes,
    find_imagenet_c,
    how_sized,
    missing_from_imagenet_c,
    open_imagenet_c,
)
from aemim_algorithm.evaluation.scores import wilson_interval

SYNSETS = ("n01440764", "n01443537")
SIDE = 32
# Answers the second class for light images, the first for others.
CLASSIFIER = by_grey_level({level: {1: 1.0} for level in range(128, 256)}, SYNSETS, size=SIDE)


class Greys:
    """One image for each grey level; the label is 1 from 128 on."""

    classes = SYNSETS

    def __init__(self, levels: Sequence[int]) -> None:
        self.levels, self.ids = levels, [str(level) for level in levels]

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        level = self.levels[index]
        return torch.full((3, SIDE, SIDE), level, dtype=torch.uint8), int(level >= 128), index


def write_official(root: Path, *, wrong: dict[str, int], side: int = SIDE, images: int = 4) -> None:
    """<corruption>/<severity>/<synset>/<name>.JPEG; of each folder, `wrong` are light but of the first class."""
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            folder = root / name / str(severity)
            for number in range(images):
                file = folder / SYNSETS[0] / f"image{number}.JPEG"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (side, side), 220 if number < wrong.get(name, 0) else 30).save(file)


def test_brightness_moves_images_over_the_threshold() -> None:
    """By 0.05, 0.1, 0.15, 0.2, 0.3 of 255 levels: 12.75, 25.5, 38.25, 51 and 76.5."""
    lines: list[str] = []
    result = evaluate_corruptions(
        CLASSIFIER,
        Greys([60, 80, 100, 120, 200]),
        table="cifar",
        seed=0,
        corruptions=["brightness", "contrast"],
        batch_size=2,
        progress=lines.append,
    )
    values = [result["accuracy"]["brightness"][str(severity)]["value"] for severity in SEVERITIES]
    assert values == [80, 80, 60, 40, 20]
    first = result["accuracy"]["brightness"]["1"]
    assert (first["n"], first["correct"], first["low"], first["high"]) == (5, 4, *wilson_interval(4, 5))
    assert result["error"] == {"brightness": pytest.approx(44), "contrast": 0}
    assert result["unnormalised_error"] == pytest.approx(22)
    assert result["intervals"]["unnormalised_error"][0] < 22 < result["intervals"]["unnormalised_error"][1]
    all_wrong = by_grey_level({level: {int(level < 128): 1.0} for level in range(256)}, SYNSETS, size=SIDE)
    worst = evaluate_corruptions(all_wrong, Greys([0]), table="cifar", seed=0, corruptions=["contrast"])
    assert worst["intervals"]["unnormalised_error"][1] == 100
    assert result["mCE"] is None
    assert "AlexNet" in result["why_no_mCE"]
    assert (result["table"], result["seed"], result["n"]) == ("cifar", 0, 5)
    assert lines[0] == "brightness, severity 1: 80.00% of 5 images"
    assert errors_of(json.loads(json.dumps(result)))["brightness"] == [20, 20, 40, 60, 80]


def test_relative_to_the_result_of_another_classifier() -> None:
    images = Greys([60, 80, 100, 120, 200])
    arguments = {"table": "cifar", "seed": 0, "severities": [3, 5], "corruptions": ["brightness"]}
    all_light = by_grey_level({level: {1: 1.0} for level in range(256)}, SYNSETS, size=SIDE)
    baseline = json.loads(json.dumps(evaluate_corruptions(all_light, images, **arguments)))
    assert errors_of(baseline) == {"brightness": [80, 80]}
    result = evaluate_corruptions(CLASSIFIER, images, **arguments, baseline=baseline)
    assert result["relative_to_baseline"]["mean"] == pytest.approx(100 * (40 + 80) / 160)
    for change in ({"seed": 1}, {"table": "imagenet"}, {"precision": "amp_bf16"}):
        with pytest.raises(ValueError, match=f"baseline: its {next(iter(change))} is"):
            evaluate_corruptions(CLASSIFIER, images, **(arguments | change), baseline=baseline)


def test_a_baseline_of_anything_else_is_refused_before_an_image_is_read() -> None:
    class Unread(Greys):
        def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
            raise AssertionError("an image was read")

    arguments = {"table": "cifar", "seed": 0, "severities": [3, 5], "corruptions": ["brightness"]}
    baseline = json.loads(json.dumps(evaluate_corruptions(CLASSIFIER, Greys([60, 80]), **arguments)))
    check_baseline(baseline, CLASSIFIER, Greys([60, 80]), **arguments)
    larger = by_grey_level({}, SYNSETS, size=SIDE + 1)
    for classifier, images, change, says in (
        (CLASSIFIER, Unread([60, 80]), {"severities": [3, 4]}, "brightness/4"),
        (CLASSIFIER, Unread([60, 80]), {"corruptions": ["contrast"]}, "brightness/3"),
        (CLASSIFIER, Unread([60, 90]), {}, "its images is"),
        (larger, Unread([60, 80]), {}, "its image_size is 32, expected 33"),
    ):
        with pytest.raises(ValueError, match=says):
            evaluate_corruptions(classifier, images, **(arguments | change), baseline=baseline)
    perfect = evaluate_corruptions(CLASSIFIER, Greys([200]), **arguments)
    with pytest.raises(ValueError, match="makes no error"):
        evaluate_corruptions(CLASSIFIER, Unread([200]), **arguments, baseline=perfect)
    del baseline["accuracy"]["brightness"]["3"]["value"]
    with pytest.raises(ValueError, match="baseline: expected the results"):
        evaluate_corruptions(CLASSIFIER, Unread([60, 80]), **arguments, baseline=baseline)


def test_mce_of_official_folders_with_known_errors(tmp_path: Path) -> None:
    write_official(tmp_path, wrong={"fog": 1, "snow": 4})
    result = evaluate_imagenet_c(CLASSIFIER, tmp_path, classes=SYNSETS)
    assert result["error"] == {name: {"fog": 25, "snow": 100}.get(name, 0) for name in CORRUPTIONS}
    relative = {"fog": 100 * 25 / ALEXNET_ERRORS["fog"], "snow": 100 * 100 / ALEXNET_ERRORS["snow"]}
    assert result["mCE"] == pytest.approx(sum(relative.values()) / 15)
    assert result["corruption_error"]["fog"] == pytest.approx(relative["fog"])
    assert result["unnormalised_error"] == pytest.approx(125 / 15)
    assert result["missing"] == []
    assert result["why_no_mCE"] is None
    assert result["incomplete"] == "4 of 50,000 images in each folder; images of 32 pixels, not 224"
    low, high = result["intervals"]["mCE"]
    half = {k: (b - a) / 2 for k in (0, 1, 4) for a, b in [wilson_interval(4 - k, 4)]}
    wrong = {"fog": 1, "snow": 4}
    expected = (
        sum((half[wrong.get(n, 0)] * 100 / (75 * ALEXNET_ERRORS[n])) ** 2 * 5 for n in CORRUPTIONS) ** 0.5
    )
    assert high - result["mCE"] == pytest.approx(expected)
    assert low == pytest.approx(max(0.0, result["mCE"] - expected))
    assert result["timing"]["images"] == 75 * 4
    json.dumps(result)


def test_missing_folders_are_named_and_leave_no_mce(tmp_path: Path) -> None:
    write_official(tmp_path, wrong={}, images=1)
    for archive, name in (("weather", "fog"), ("blur", "zoom_blur")):
        (tmp_path / archive).mkdir()
        (tmp_path / name).rename(tmp_path / archive / name)
    (tmp_path / "snow").rename(tmp_path / "elsewhere")
    (tmp_path / "frost" / "3").rename(tmp_path / "frost" / "3.part")
    found = find_imagenet_c(tmp_path)
    assert missing_from_imagenet_c(found) == ["snow", "frost/3"]
    assert found["fog", 1] == tmp_path / "weather" / "fog" / "1"
    result = evaluate_imagenet_c(CLASSIFIER, tmp_path, classes=SYNSETS)
    assert (result["mCE"], result["corruption_error"], result["unnormalised_error"]) == (None, None, None)
    assert result["why_no_mCE"] == "missing: snow, frost/3"
    assert len(result["accuracy"]) == 14
    assert len(result["accuracy"]["frost"]) == 4
    with pytest.raises(
        ValueError, match="none of ImageNet-C's folders is there; expected such as gaussian_noise/1"
    ):
        find_imagenet_c(tmp_path / "frost")


def test_official_images_are_not_resized_at_their_own_size(tmp_path: Path) -> None:
    noise = torch.randint(
        0, 256, (224, 224, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    file = tmp_path / "fog" / "2" / SYNSETS[1] / "a.JPEG"
    file.parent.mkdir(parents=True)
    Image.fromarray(noise.numpy()).save(file, format="PNG")
    found = find_imagenet_c(tmp_path)
    ((_, images),) = open_imagenet_c(found, image_size=224, classes=SYNSETS)
    image, label, _ = images[0]
    assert torch.equal(image, noise.permute(2, 0, 1))
    assert label == 1
    assert how_sized(224) == "official 224-pixel images as they are"
    ((_, images),) = open_imagenet_c(found, image_size=112, classes=SYNSETS)
    halved = Image.fromarray(noise.numpy()).resize((112, 112), Image.Resampling.BICUBIC)
    assert torch.equal(
        images[0][0],
        torch.tensor(list(halved.tobytes()), dtype=torch.uint8).view(112, 112, 3).permute(2, 0, 1),
    )
    assert "resized to 112 pixels without another crop" in how_sized(112)


def test_a_folder_that_lacks_images_is_refused(tmp_path: Path) -> None:
    write_official(tmp_path, wrong={})
    (tmp_path / "fog" / "3" / SYNSETS[0] / "image2.JPEG").unlink()
    with pytest.raises(ValueError, match="has 3 images and .* has 4; expected the same number") as caught:
        evaluate_imagenet_c(CLASSIFIER, tmp_path, classes=SYNSETS)
    assert "\n" not in str(caught.value)


def test_one_official_set_is_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_official(tmp_path, wrong={}, images=1)
    opened: list[weakref.ref] = []
    most = 0

    def watched(*arguments: object, **options: object) -> Iterator[tuple]:
        nonlocal most
        for key, images in open_imagenet_c(*arguments, **options):
            opened.append(weakref.ref(images))
            most = max(most, sum(reference() is not None for reference in opened))
            yield key, images

    monkeypatch.setattr(corruption_suite, "open_imagenet_c", watched)
    evaluate_imagenet_c(CLASSIFIER, tmp_path, classes=SYNSETS)
    assert len(opened) == 75
    assert most <= 3


def test_a_foreign_class_in_one_folder_is_found_before_the_first_is_run(tmp_path: Path) -> None:
    write_official(tmp_path, wrong={}, images=1)
    (tmp_path / "jpeg_compression" / "5" / "tench").mkdir()
    with pytest.raises(ValueError, match=r"jpeg_compression.5: .*'tench'"):
        check_classes(find_imagenet_c(tmp_path), classes=SYNSETS)
    (tmp_path / "jpeg_compression" / "5" / "tench").rmdir()
    (tmp_path / "jpeg_compression" / "5" / "README").touch()
    check_classes(find_imagenet_c(tmp_path), classes=SYNSETS)
