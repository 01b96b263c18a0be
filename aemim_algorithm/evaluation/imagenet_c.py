"""The official ImageNet-C as its authors hand it out: <corruption>/<severity>/<synset>/<name>.JPEG.

doi 10.5281/zenodo.2235448, arXiv 1903.12261. The images are the middle 224 x 224 pixels of ImageNet's
validation images at a short side of 256, corrupted and saved as JPEG: a classifier for 224 pixels gets them
as they are, without the second resize and crop that a usual evaluation transform would do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from aemim_algorithm.evaluation.corruptions.parameters import CORRUPTIONS, SEVERITIES
from aemim_algorithm.evaluation.image_sets import ImageSet, open_images

__all__ = [
    "OFFICIAL_IMAGES",
    "OFFICIAL_SIZE",
    "check_classes",
    "find_imagenet_c",
    "how_sized",
    "missing_from_imagenet_c",
    "open_imagenet_c",
    "why_incomplete",
]

OFFICIAL_SIZE = 224
OFFICIAL_IMAGES = 50_000
"""Images in each of the 75 folders."""

# The authors' archives unpack next to each other, or each into a folder of its name.
_ARCHIVES = ("", "noise", "blur", "weather", "digital")


def find_imagenet_c(root: str | Path) -> dict[tuple[str, int], Path]:
    """Find the folders of corruptions and severities.

    Args:
        root: The folder that the archives were unpacked in.

    Returns:
        (corruption, severity) -> folder of class folders, in the order of ImageNet-C.

    Raises:
        ValueError: None of the 75 is there.
    """
    root = Path(root)
    found: dict[tuple[str, int], Path] = {}
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            places = (root / archive / name / str(severity) for archive in _ARCHIVES)
            if (place := next((place for place in places if place.is_dir()), None)) is not None:
                found[name, severity] = place
    if not found:
        raise ValueError(
            f"{root}: none of ImageNet-C's folders is there; expected such as {CORRUPTIONS[0]}/1/n01440764: "
            "unpack the archives of ImageNet-C (doi 10.5281/zenodo.2235448) there"
        )
    return found


def missing_from_imagenet_c(found: Mapping[tuple[str, int], Path]) -> list[str]:
    """What of the 75 folders is not there.

    Args:
        found: What `find_imagenet_c` returned.

    Returns:
        Names such as "fog/3", or "fog" where all five severities are missing.
    """
    missing: list[str] = []
    for name in CORRUPTIONS:
        absent = [severity for severity in SEVERITIES if (name, severity) not in found]
        missing += [name] if len(absent) == len(SEVERITIES) else [f"{name}/{severity}" for severity in absent]
    return missing


def check_classes(
    found: Mapping[tuple[str, int], Path], *, classes: Sequence[str], called: Mapping[str, str] | None = None
) -> None:
    """Look at the class folders of all sets, without their images.

    Args:
        found: What `find_imagenet_c` returned.
        classes: The classifier's class names.
        called: Class of each folder name, see `open_images`.

    Raises:
        ValueError: A set has no class folders, or one that is no class of the classifier.
    """
    known = set(classes)
    for folder in found.values():
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
        foreign = [name for name in names if (called or {}).get(name, name) not in known]
        if foreign or not names:
            what = (
                f"{len(foreign)} of its {len(names)} class folders are"
                if names
                else "it has no class folders,"
            )
            raise ValueError(
                f"{folder}: {what} none of the classifier's {len(known)} classes"
                + (f", first {foreign[0]!r}" if foreign else "")
                + ": unpack the archives of ImageNet-C again, into an empty folder"
            )


def why_incomplete(counts: Iterable[int], *, image_size: int, missing: Sequence[str]) -> str | None:
    """Why a result is not to be compared with published ones; None: it is.

    Args:
        counts: Images of each folder.
        image_size: Side of the images that the classifier got, in pixels.
        missing: What `missing_from_imagenet_c` returned.
    """
    reasons = [f"missing: {', '.join(missing)}"] if missing else []
    if others := sorted(set(counts) - {OFFICIAL_IMAGES}):
        reasons.append(f"{others[0]:,} of {OFFICIAL_IMAGES:,} images in each folder")
    if image_size != OFFICIAL_SIZE:
        reasons.append(f"images of {image_size} pixels, not {OFFICIAL_SIZE}")
    return "; ".join(reasons) or None


def open_imagenet_c(
    found: Mapping[tuple[str, int], Path],
    *,
    image_size: int,
    interpolation: str = "bicubic",
    classes: Sequence[str] | None = None,
    called: Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
) -> Iterator[tuple[tuple[str, int], ImageSet]]:
    """Open one set after the other: the names of all 75 times 50,000 images would fill memory.

    Args:
        found: What `find_imagenet_c` returned.
        image_size: Side of the classifier's images, in pixels; see `how_sized`.
        interpolation: Of the resize, where one is needed.
        classes: Class names in the classifier's order, see `open_images`.
        called: Class of each folder name, see `open_images`.
        only: Names of the images to keep, such as "n01440764/ILSVRC2012_val_00000293.JPEG".

    Yields:
        (corruption, severity) and the set.

    Raises:
        ValueError: A set cannot be opened, or has another number of images than the first.
    """
    count, first = None, ""
    for (name, severity), folder in found.items():
        images = open_images(
            folder,
            image_size=image_size,
            crop_fraction=1.0,
            interpolation=interpolation,
            classes=classes,
            called=called,
            already_sized=True,
            only=only,
        )
        if count is not None and len(images) != count:
            raise ValueError(
                f"{folder} has {len(images)} images and {first} has {count}; expected the same number: "
                "unpack the archives again"
            )
        count, first = len(images), first or str(folder)
        yield (name, severity), images


def how_sized(image_size: int) -> str:
    """What happens to the official images before the classifier sees them, in words."""
    if image_size == OFFICIAL_SIZE:
        return f"official {OFFICIAL_SIZE}-pixel images as they are"
    return (
        f"official {OFFICIAL_SIZE}-pixel images resized to {image_size} pixels without another crop: "
        f"published numbers are of {OFFICIAL_SIZE} pixels"
    )
