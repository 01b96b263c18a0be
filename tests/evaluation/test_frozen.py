from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_mae
from timm.data.constants import IMAGENET_DEFAULT_MEAN as IMAGENET_MEAN
from timm.data.constants import IMAGENET_DEFAULT_STD as IMAGENET_STD
from torch import Tensor
from torchvision.io import encode_png

from aemim_algorithm.data.shards import write_shards
from aemim_algorithm.evaluation import evaluate_encoders, knn_accuracy, linear_probe_accuracy
from aemim_algorithm.models.vit import MaskedViT


def noisy_colours(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images whose class is a colour under much noise, uint8 of shape (count, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = torch.rand(count, 3, 16, 16, generator=generator) * 150
    tint = torch.randn(count, 3, 1, 1, generator=generator) * 12
    colours = torch.eye(3)[labels] * 25 + 50
    return (noise + tint + colours[:, :, None, None]).clamp(0, 255).to(torch.uint8), labels


def shards(
    folder: Path, images: Tensor, labels: Tensor, classes: tuple[str, ...] = ("red", "green", "blue")
) -> Path:
    samples = [
        (encode_png(image).numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    ]
    write_shards(samples, folder, classes=classes, made_from={})
    return folder


def test_scores_are_those_of_the_patch_averages(tmp_path: Path) -> None:
    (train, labels), (test, targets) = noisy_colours(90, seed=0), noisy_colours(45, seed=1)
    encoder = tiny_mae().encoder.train()
    other = tiny_mae(seed=1).encoder
    scores = evaluate_encoders(
        {"one": encoder, "other": other},
        shards(tmp_path / "train", train, labels),
        shards(tmp_path / "test", test, targets),
        image_size=16,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        batch_size=32,
    )
    assert encoder.training

    def features(encoder: MaskedViT, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
        with torch.no_grad():
            return encoder((images / 255 - mean) / std)[:, 1:].mean(dim=1)

    for name, scored in {"one": encoder, "other": other}.items():
        splits = (features(scored, train), labels, features(scored, test), targets)
        assert scores[name].keys() == {"knn", "linear"}
        # One test image is 2.2%; rounding may move one that lies on a border.
        assert scores[name]["knn"] == pytest.approx(knn_accuracy(*splits), abs=2.3)
        assert scores[name]["linear"] == pytest.approx(linear_probe_accuracy(*splits), abs=2.3)
        assert 45 < min(scores[name].values()) < 100


def test_classes_are_matched_by_their_names(tmp_path: Path) -> None:
    (train, labels), (test, targets) = noisy_colours(90, seed=0), noisy_colours(45, seed=1)
    some = targets != 1
    learnt = shards(tmp_path / "train", train, labels)
    known = shards(tmp_path / "known", test[some], targets[some])
    other = shards(tmp_path / "other", test[some], (targets[some] == 0).long(), ("blue", "red"))
    encoders = {"it": tiny_mae().encoder}
    options: dict[str, Any] = {"image_size": 16, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    expected = evaluate_encoders(encoders, learnt, known, **options)
    assert evaluate_encoders(encoders, learnt, other, **options) == expected
    assert expected["it"]["knn"] > 45
    strange = shards(tmp_path / "strange", test[some], (targets[some] == 0).long(), ("blue", "zebra"))
    with pytest.raises(ValueError, match="the class 'zebra' is none of the 3") as caught:
        evaluate_encoders(encoders, learnt, strange, **options)
    assert "\n" not in str(caught.value)
