"""Sizes that cannot work are refused where the model is built, by name and in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_mae
from models_own import tokenizer_file

from aemim_algorithm.models import MODELS

VITS = ["mae_vit_tiny_patch4", "simmim_vit_tiny_patch4", "maskfeat_vit_tiny_patch4", "beit_vit_tiny_patch4"]
SWIN = "simmim_swin_tiny_patch2_window4"
BLOCKS = ["maskfeat_vit_tiny_patch4", "beit_vit_tiny_patch4"]

VIT_SIZES: list[tuple[dict[str, Any], str]] = [
    ({"patch_size": 0}, "patch_size=0 is out of range: expected an integer >= 1"),
    ({"patch_size": -4}, "patch_size=-4 is out of range: expected an integer >= 1"),
    ({"patch_size": 5}, "image_size=32 is not a multiple of patch_size=5"),
    ({"image_size": 30}, "image_size=30 is not a multiple of patch_size=4"),
    ({"image_size": (32, 30)}, r"image_size=\(32, 30\) is not a multiple of patch_size=4"),
    ({"image_size": 0}, "image_size=0 is out of range: expected an integer >= 1"),
    ({"image_size": (32, 32, 3)}, r"image_size=\(32, 32, 3\): expected .* \(height, width\)"),
    ({"embed_dim": 0}, "embed_dim=0 is out of range: expected an integer >= 1"),
    ({"depth": 0}, "depth=0 is out of range: expected an integer >= 1"),
    ({"num_heads": 0}, "num_heads=0 is out of range: expected an integer >= 1"),
    ({"num_heads": 5}, "embed_dim=192 must be a multiple of num_heads=5"),
]
SWIN_SIZES: list[tuple[dict[str, Any], str]] = [
    ({"patch_size": 0}, "patch_size=0 is out of range: expected an integer >= 1"),
    ({"window_size": 0}, "window_size=0 is out of range: expected an integer >= 1"),
    ({"image_size": 0}, "image_size=0 is out of range: expected an integer >= 1"),
    ({"embed_dim": 0}, "embed_dim=0 is out of range: expected an integer >= 1"),
    ({"depths": (2, 0, 2)}, r"depths\[1\]=0 is out of range: expected an integer >= 1"),
    ({"depths": ()}, r"depths=\(\) and num_heads=\(3, 6, 12\): expected one of each for every stage"),
    ({"num_heads": (3, 6)}, r"num_heads=\(3, 6\): expected one of each for every stage"),
    ({"num_heads": (3, 0, 6)}, r"num_heads\[1\]=0 is out of range: expected an integer >= 1"),
    ({"num_heads": (3, 5, 6)}, r"2 \* embed_dim=192 must be a multiple of num_heads\[1\]=5"),
]
DROP_PATHS = [1.5, 1.0, -0.1, float("nan"), "0.1", True]


def build(name: str, **overrides: Any) -> torch.nn.Module:
    if name.startswith("beit"):
        overrides["tokenizer"] = str(tokenizer_file())
    with torch.device("meta"):
        return MODELS[name](**overrides)


def refused(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(name, **overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize(("overrides", "message"), VIT_SIZES)
def test_sizes_of_a_vit(name: str, overrides: dict[str, Any], message: str) -> None:
    if name.startswith("maskfeat") and overrides.get("patch_size") == 5:
        overrides = overrides | {"cell_size": 5}
    refused(name, overrides, message)


@pytest.mark.parametrize(("overrides", "message"), SWIN_SIZES)
def test_sizes_of_a_swin(overrides: dict[str, Any], message: str) -> None:
    refused(SWIN, overrides, message)


@pytest.mark.parametrize("name", [*VITS[1:], SWIN])
@pytest.mark.parametrize("rate", DROP_PATHS)
def test_a_rate_of_stochastic_depth_is_below_1(name: str, rate: Any) -> None:
    refused(name, {"drop_path": rate}, "drop_path=.* is out of range: expected a number in \\[0, 1\\)")


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("block", [0, -5, 2.5])
def test_rectangles_of_a_mask_have_patches(name: str, block: Any) -> None:
    refused(name, {"min_block": block}, f"min_block={block} is out of range: expected an integer >= 1")


@pytest.mark.parametrize(
    "sizes", [{"orientations": 0}, {"orientations": -9}, {"cell_size": 0}, {"cell_size": -4}]
)
def test_sizes_of_histograms(sizes: dict[str, int]) -> None:
    (name, value), *_ = sizes.items()
    refused("maskfeat_vit_tiny_patch4", sizes, f"{name}={value} is out of range: expected an integer >= 1")


@pytest.mark.parametrize("name", ["decoder_dim", "decoder_depth", "decoder_heads"])
def test_sizes_of_maes_decoder(name: str) -> None:
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"{name}={value} is out of range: expected an integer >= 1"):
            tiny_mae(**{name: value})


@pytest.mark.parametrize("name", [*VITS, SWIN])
def test_what_can_work_is_built(name: str, tmp_path: Path) -> None:
    build(name)
    build(name, image_size=(32, 64))
    if name != VITS[0]:
        build(name, drop_path=0)
        build(name, drop_path=0.99)
