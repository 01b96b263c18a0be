"""Against timm's published numbers, in the layout of its repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from aemim_algorithm.evaluation.published import compare_with_published, published_numbers

_HEAD = "model,img_size,top1,top1_err,top5,top5_err,param_count,crop_pct,interpolation"
_LINES = {
    "results-imagenet.csv": ["net.a1_in1k,224,80.000,20.000,95.000,5.000,25.56,0.950,bicubic"],
    "results-imagenet-a.csv": [
        "net.a1_in1k,224,10.500,89.500,40.000,60.000,25.56,0.950,bicubic,-70.000,-55.000,-3",
        'net.a1_in1k,288,12.000,88.000,42.000,58.000,"1,013.01",1.000,bicubic,-70.000,-55.000,-3',
    ],
}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    for name, lines in _LINES.items():
        (tmp_path / "results" / name).write_text("\n".join([_HEAD, *lines]) + "\n")
    return tmp_path


def test_differences_are_per_set_and_metric(clone: Path) -> None:
    rows = [
        {"set": "imagenet", "metric": "top1", "value": 79.5, "low": 79.1, "high": 79.9},
        {"set": "a", "metric": "top5", "value": 41.0, "low": 39.9, "high": 42.1},
        {"set": "v2", "metric": "top1", "value": 70.0, "low": 69.0, "high": 71.0},
        {"set": "imagenet", "metric": "top1", "value": 1.0, "low": 0.9, "high": 1.1, "attack": "pgd"},
    ]
    found = compare_with_published(
        rows, published_numbers(clone, "net.a1_in1k", image_size=224, crop_fraction=0.95)
    )
    assert found == [
        {
            "set": "imagenet",
            "metric": "top1",
            "value": 79.5,
            "published": 80.0,
            "difference": -0.5,
            "within_interval": False,
        },
        {
            "set": "a",
            "metric": "top5",
            "value": 41.0,
            "published": 40.0,
            "difference": 1.0,
            "within_interval": True,
        },
    ]


def test_the_image_size_chooses_the_line(clone: Path) -> None:
    assert published_numbers(clone / "results", "net.a1_in1k", image_size=288, crop_fraction=1.0) == {
        "a": {"top1": 12.0, "top5": 42.0}
    }


def test_unknown_names_sizes_and_folders_are_one_line(clone: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lists net.a1_in1k at 224, 288 pixels, not at 192"):
        published_numbers(clone, "net.a1_in1k", image_size=192, crop_fraction=0.95)
    with pytest.raises(ValueError, match=r"lists net.a1_in1k at 288 pixels with a crop of 1.000, not 0.950"):
        published_numbers(clone, "net.a1_in1k", image_size=288, crop_fraction=0.95)
    with pytest.raises(ValueError, match="does not list 'net.a2_in1k'; did you mean 'net.a1_in1k'"):
        published_numbers(clone, "net.a2_in1k", image_size=224, crop_fraction=0.95)
    with pytest.raises(ValueError, match="expected a clone of pytorch-image-models"):
        published_numbers(tmp_path / "results" / "none", "net", image_size=224, crop_fraction=0.95)
    (clone / "results" / "results-sketch.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns model, img_size, crop_pct, top1, top5"):
        published_numbers(clone, "net.a1_in1k", image_size=224, crop_fraction=0.95)
