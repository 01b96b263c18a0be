"""``classifier.pt``: what is written comes back, and anything else is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from aemim_algorithm.classifier import read_classifier, save_classifier

ARCHITECTURE = {
    "name": "vit_tiny_patch16_224",
    "kwargs": {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 24,
        "depth": 1,
        "num_heads": 2,
        "num_classes": 3,
    },
}


def write(path: Path, **changes: Any) -> Any:
    network: Any = timm.create_model(ARCHITECTURE["name"], **ARCHITECTURE["kwargs"])  # type: ignore[arg-type]
    options: dict[str, Any] = {
        "state": network.state_dict(),
        "architecture": ARCHITECTURE,
        "image_size": 16,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.1, 0.2, 0.3),
        "classes": ["a", "b", "c"],
        "crop_fraction": 0.875,
    }
    save_classifier(path, **options | changes)
    return network.eval()


def test_a_classifier_comes_back(tmp_path: Path) -> None:
    network = write(tmp_path / "run" / "classifier.pt")
    before = torch.get_rng_state()
    read = read_classifier(tmp_path / "run" / "classifier.pt")
    assert torch.equal(torch.get_rng_state(), before)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(read.model(images), network(images))
    assert (read.image_size, read.crop_fraction, read.interpolation) == (16, 0.875, "bicubic")
    assert (read.mean, read.std, read.classes) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3), ("a", "b", "c"))
    assert read.name == "run/classifier.pt"
    assert not read.model.training


def test_classes_may_be_unknown(tmp_path: Path) -> None:
    write(tmp_path / "classifier.pt", classes=None)
    assert read_classifier(tmp_path / "classifier.pt").classes is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; expected"),
        (b"text", "does not read as a classifier"),
        ({"blocks.0.attn.qkv.weight": torch.zeros(1)}, "lacks 'model'; expected"),
        ([1], "is no dict"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "classifier.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        read_classifier(path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    other = ARCHITECTURE["kwargs"] | {"embed_dim": 32}  # type: ignore[operator]
    write(tmp_path / "classifier.pt", architecture={"name": ARCHITECTURE["name"], "kwargs": other})
    with pytest.raises(ValueError, match=r"the state in .*classifier.pt does not fit .*expected"):
        read_classifier(tmp_path / "classifier.pt")


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "classifier.pt", architecture={"name": "vit_none", "kwargs": {}})
    with pytest.raises(ValueError, match="timm cannot build its architecture"):
        read_classifier(tmp_path / "classifier.pt")
