"""Predictions stream in order, and clean up after themselves."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest
import torch
from hand_made import by_grey_level, write_grey
from torch import Tensor, nn
from torch.utils.data import Dataset

from aemim_algorithm.classifier import Classifier
from aemim_algorithm.evaluation.image_sets import open_images
from aemim_algorithm.evaluation.predict import predict


class _Images(Dataset[tuple[Tensor, int, int]]):
    """Images of a grey level that counts up, which say how many of them are alive."""

    def __init__(self, count: int, seconds: float = 0.0) -> None:
        self.count, self.seconds = count, seconds

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        time.sleep(self.seconds)
        return torch.full((3, 8, 8), index % 256, dtype=torch.uint8), index % 2, index


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_last_batch(workers: int, tmp_path: Path) -> None:
    write_grey(tmp_path, {f"{'ab'[i % 2]}/{i}.png": i for i in range(7)})
    images = open_images(tmp_path, image_size=8)
    classifier = by_grey_level({i: {0: float(i)} for i in range(7)}, classes=("a", "b"))
    batches = list(predict(classifier, images, batch_size=3, workers=workers))
    assert [len(labels) for _, labels, _ in batches] == [3, 3, 1]
    logits, labels, indices = (torch.cat(parts) for parts in zip(*batches, strict=True))
    names = [images.ids[i] for i in indices.tolist()]
    assert logits[:, 0].tolist() == [float(Path(name).stem) for name in names]
    assert labels.tolist() == ["ab".index(name[0]) for name in names]
    assert logits.dtype == torch.float32


def test_the_batch_size_does_not_change_the_logits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(144, 2)
    )
    classifier = Classifier(model=model, image_size=8, mean=(0.5,) * 3, std=(0.2,) * 3, classes=("a", "b"))
    one, all_at_once = (
        torch.cat([logits for logits, _, _ in predict(classifier, _Images(9), batch_size=size)])
        for size in (1, 9)
    )
    torch.testing.assert_close(one, all_at_once, rtol=0, atol=1e-5)


def test_modes_gradients_and_generators_are_left_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2), nn.Dropout())
    model.train()
    model[2].eval()
    classifier = Classifier(model=model, image_size=8, mean=(0.5,) * 3, std=(0.2,) * 3, classes=("a", "b"))
    before = torch.get_rng_state()
    for logits, _, _ in predict(classifier, _Images(4), batch_size=2):
        assert not logits.requires_grad
        assert torch.is_grad_enabled()
    assert torch.equal(before, torch.get_rng_state())
    assert [module.training for module in model] == [True, True, False]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_batch_is_kept() -> None:
    """Tensors alive after 2 and after 60 batches are as many: memory does not grow with the set."""
    classifier = by_grey_level({}, classes=("a", "b"))

    def alive(count: int) -> int:
        predictions = predict(classifier, _Images(count), batch_size=2)
        for _ in range(count // 2):
            batch = next(predictions)
        assert len(batch[1]) == 2
        gc.collect()  # what earlier tests left
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    few = alive(4)  # first, as what the long run kept would still be there
    assert alive(120) <= few


def test_waiting_for_data_is_told_from_computing() -> None:
    slow_data = predict(by_grey_level({}, classes=("a", "b")), _Images(6, seconds=0.02), batch_size=2)
    assert slow_data.share_waiting == 0.0
    list(slow_data)
    assert slow_data.images == 6
    assert slow_data.share_waiting > 0.8
    assert slow_data.waiting <= slow_data.seconds

    class Slow(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            time.sleep(0.05)
            return images.flatten(1)[:, :2]

    classifier = Classifier(model=Slow(), image_size=8, mean=(0.5,) * 3, std=(0.2,) * 3, classes=("a", "b"))
    slow_model = predict(classifier, _Images(6), batch_size=2)
    list(slow_model)
    assert slow_model.share_waiting < 0.3


def test_bad_output_is_refused() -> None:
    classifier = by_grey_level({1: {0: float("nan")}}, classes=("a", "b"))
    with pytest.raises(ValueError, match="by grey level: its logits are not finite"):
        list(predict(classifier, _Images(4)))
    three = Classifier(
        model=nn.Sequential(nn.Flatten(), nn.Linear(192, 3)),
        image_size=8,
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        classes=("a", "b"),
    )
    with pytest.raises(ValueError, match=r"got logits of shape \(4, 3\), expected \(4, 2\)"):
        list(predict(three, _Images(4)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_line_from_a_worker_too(workers: int, tmp_path: Path) -> None:
    write_grey(tmp_path, {"a/1.png": 1})
    (tmp_path / "a" / "2.png").write_bytes(b"\x89PNG no picture")
    images = open_images(tmp_path, image_size=8)
    with pytest.raises(ValueError, match=r"a/2.png: image: .* cannot be decoded") as error:
        list(predict(by_grey_level({}, classes=("a",)), images, workers=workers))
    assert "\n" not in str(error.value)
