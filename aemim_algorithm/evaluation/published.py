"""Compare with the numbers that timm publishes: `results/results-*.csv` of its repository.

They are not in timm's package: a clone of github.com/huggingface/pytorch-image-models has them.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aemim_algorithm.validation import nearest

__all__ = ["FILES", "compare_with_published", "published_numbers"]

_CROP_DIGITS = 0.0006  # the lists round to three

FILES = {
    "imagenet": "results-imagenet.csv",
    "real": "results-imagenet-real.csv",
    "v2": "results-imagenetv2-matched-frequency.csv",
    "a": "results-imagenet-a.csv",
    "r": "results-imagenet-r.csv",
    "sketch": "results-sketch.csv",
}


def published_numbers(
    folder: str | Path, name: str, *, image_size: int, crop_fraction: float
) -> dict[str, dict[str, float]]:
    """What timm publishes about a classifier.

    Args:
        folder: A clone of pytorch-image-models, or its folder `results`.
        name: timm's name of the classifier, with its tag, such as `resnet50.a1_in1k`.
        image_size: Side of the images, in pixels: timm lists some models at several sizes.
        crop_fraction: Share of the resized image that is kept: with another one it is another number.

    Returns:
        For each set that timm lists it in: `top1` and `top5`, in percent.

    Raises:
        ValueError: The folder has none of timm's lists, or they do not name the classifier at this
            size and crop.
    """
    folder = Path(folder)
    results = folder / "results" if (folder / "results").is_dir() else folder
    if not any((results / file).is_file() for file in FILES.values()):
        raise ValueError(
            f"published={folder}: expected a clone of pytorch-image-models, with results/{FILES['imagenet']}"
        )
    found = {key: _published(results / file, name, image_size, crop_fraction) for key, file in FILES.items()}
    numbers = {key: value for key, value in found.items() if value is not None}
    if not numbers:
        raise ValueError(_unknown(results, name, image_size, crop_fraction))
    return numbers


def compare_with_published(
    rows: Iterable[Mapping[str, Any]], numbers: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """By how much results differ from published ones.

    Args:
        rows: `set`, `metric`, `value`, `low` and `high` in percent; those of attacks are left out.
        numbers: What `published_numbers` returned.

    Returns:
        For each row that has a published number: `set`, `metric`, `value`, `published`, `difference` (ours
        minus theirs, in percentage points) and `within_interval` (whether theirs lies in our 95% interval).
    """
    compared = []
    for row in rows:
        if "attack" in row:  # also a top1 of the set, but no accuracy of the clean images
            continue
        published = numbers.get(row["set"], {}).get(row["metric"])
        if published is not None:
            difference = {
                "published": published,
                "difference": round(row["value"] - published, 3),
                "within_interval": row["low"] <= published <= row["high"],
            }
            compared.append({key: row[key] for key in ("set", "metric", "value")} | difference)
    return compared


def _published(file: Path, name: str, image_size: int, crop_fraction: float) -> dict[str, float] | None:
    for row in _read(file):
        same = row["model"] == name and int(row["img_size"]) == image_size
        if same and abs(float(row["crop_pct"]) - crop_fraction) < _CROP_DIGITS:
            return {"top1": float(row["top1"]), "top5": float(row["top5"])}
    return None


def _read(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    if rows and not {"model", "img_size", "crop_pct", "top1", "top5"} <= set(rows[0]):
        raise ValueError(
            f"{file}: expected the columns model, img_size, crop_pct, top1, top5: it is not a list of timm's"
        )
    return rows


def _unknown(results: Path, name: str, image_size: int, crop_fraction: float) -> str:
    listed = [row for file in FILES.values() for row in _read(results / file)]
    sizes = sorted({row["img_size"] for row in listed if row["model"] == name}, key=int)
    crops = sorted(
        {row["crop_pct"] for row in listed if row["model"] == name and row["img_size"] == str(image_size)}
    )
    if crops:
        return (
            f"{results} lists {name} at {image_size} pixels with a crop of {', '.join(crops)}, "
            f"not {crop_fraction:.3f}"
        )
    if sizes:
        return f"{results} lists {name} at {', '.join(sizes)} pixels, not at {image_size}, in these sets"
    close = nearest(name, {row["model"] for row in listed})
    return f"{results} does not list {name!r}" + (f"; did you mean {close!r}?" if close else "")
