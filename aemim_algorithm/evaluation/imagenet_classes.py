"""ImageNet's classes: their order, the 200 of -A and -R, the labels of ImageNet-Real; all from timm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Literal

import torch
from torch import Tensor

__all__ = ["RealLabels", "imagenet_lemmas", "imagenet_synsets", "numbered", "subset_indices"]


@cache
def imagenet_synsets() -> tuple[str, ...]:
    """The 1,000 WordNet ids in the order of the labels, which is the sorted one; `n01440764` is 0."""
    return tuple(_read("imagenet_synsets.txt").split())


@cache
def imagenet_lemmas() -> tuple[str, ...]:
    """The names of the 1,000 classes, such as `tench, Tinca tinca`, in the order of the labels."""
    lines = (line.split("\t", 1) for line in _read("imagenet_synset_to_lemma.txt").splitlines() if line)
    lemmas = {synset: name.strip() for synset, name in lines}
    return tuple(lemmas[synset] for synset in imagenet_synsets())


@cache
def numbered() -> dict[str, str]:
    """Synset of each class number, "0" to "999", as the folders of ImageNet-V2 are called.

    Sorted as text they would be 0, 1, 10, 100, ...: labels must not come from their order.
    """
    return {str(number): synset for number, synset in enumerate(imagenet_synsets())}


def subset_indices(name: Literal["a", "r"], classes: Sequence[str]) -> Tensor:
    """The 200 classes of ImageNet-A or -R, as a classifier numbers them.

    Args:
        name: Which of the two.
        classes: The classifier's classes, synsets.

    Returns:
        Shape (200,), int64.

    Raises:
        ValueError: The classifier lacks one of them.
    """
    label = {synset: position for position, synset in enumerate(classes)}
    synsets = _read(f"imagenet_{name}_synsets.txt").split()
    missing = [synset for synset in synsets if synset not in label]
    if missing:
        raise ValueError(
            f"the classifier has not {len(missing)} of the {len(synsets)} classes of "
            f"ImageNet-{name.upper()}, first {missing[0]!r}"
        )
    return torch.tensor([label[synset] for synset in synsets])


class RealLabels:
    """The labels of "Are we done with ImageNet?" (arXiv 2006.07159): any number of them for each image.

    Args:
        classes: The classifier's classes, synsets.

    Raises:
        ValueError: The classifier lacks one of ImageNet's classes.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        label = {synset: position for position, synset in enumerate(classes)}
        if missing := [synset for synset in imagenet_synsets() if synset not in label]:
            raise ValueError(f"the classifier has not {len(missing)} of ImageNet's classes: {missing[0]!r}")
        self._position = [label[synset] for synset in imagenet_synsets()]
        self._labels: list[list[int]] = json.loads(_read("imagenet_real_labels.json"))

    def of(self, image: str) -> list[int]:
        """The right answers for an image, as the classifier numbers them; none: it is not counted.

        Args:
            image: Its file's name, `ILSVRC2012_val_00000001.JPEG`, or a path that ends in it.

        Raises:
            ValueError: It is no such name, or a number beyond 50,000.
        """
        stem = PurePosixPath(image).stem
        number = stem.removeprefix("ILSVRC2012_val_")
        known = stem.startswith("ILSVRC2012_val_") and number.isascii() and number.isdigit()
        if not known or not 1 <= int(number) <= len(self._labels):
            raise ValueError(
                f"{image!r} is no image of ImageNet's validation set: ImageNet-Real needs the original "
                "files, ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_00050000.JPEG, in any folders"
            )
        return [self._position[label] for label in self._labels[int(number) - 1]]

    def right(self, answers: Tensor, images: Sequence[str]) -> Tensor:
        """Which answers are right, of the images that count.

        Args:
            answers: Shape (batch, k): the classifier's best k classes.
            images: Name of each image.

        Returns:
            Shape (images with a label,), bool: whether one of the k is among the image's labels.
        """
        labels = [self.of(image) for image in images]
        hits = [
            any(answer in truth for answer in row)
            for row, truth in zip(answers.tolist(), labels, strict=True)
            if truth
        ]
        return torch.tensor(hits, dtype=torch.bool)


def _read(name: str) -> str:
    return files("timm.data").joinpath("_info", name).read_text(encoding="utf-8")
