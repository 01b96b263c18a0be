"""ImageNet and its variants: how each set is laid out, which classes can be answered, what is right.

| set | folders | answers | counted |
|---|---|---|---|
| `imagenet` | synsets | all classes | every image |
| `real` | any; only the files' names matter | all classes | images with a label; any of them is right |
| `v2` | class numbers 0 to 999, or synsets | all classes | every image |
| `a`, `r` | synsets | the 200 classes of the set | every image |
| `sketch` | synsets | all classes | every image |
| `clean` | the classifier's own classes, of any data set | all classes | every image |

Sets that are the same folder, such as `imagenet` and `real`, are read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from aemim_algorithm.classifier import Classifier
from aemim_algorithm.evaluation.image_sets import ImageSet, open_images
from aemim_algorithm.evaluation.imagenet_classes import (
    RealLabels,
    imagenet_synsets,
    numbered,
    subset_indices,
)
from aemim_algorithm.evaluation.scores import Proportion, topk

__all__ = ["SETS", "SetKind", "SetScore", "open_set", "require_imagenet"]


@dataclass(frozen=True)
class SetKind:
    """What is particular about a set.

    Attributes:
        title: Its name in tables.
        images: Images that count in the complete set; None: it has no official size.
    """

    title: str
    images: int | None


SETS: dict[str, SetKind] = {
    "clean": SetKind("clean", None),
    "imagenet": SetKind("ImageNet", 50_000),
    "real": SetKind("ImageNet-Real", 46_837),
    "v2": SetKind("ImageNet-V2", 10_000),
    "a": SetKind("ImageNet-A", 7_500),
    "r": SetKind("ImageNet-R", 30_000),
    "sketch": SetKind("ImageNet-Sketch", 50_889),
}


_MASKED = ("a", "r")


def open_set(
    name: str,
    source: str | Path,
    classifier: Classifier,
    *,
    only: Sequence[str] | None = None,
    already_sized: bool | None = None,
) -> ImageSet:
    """Open one of `SETS` as a classifier is to see it.

    Args:
        name: One of `SETS`.
        source: As for `open_images`.
        classifier: Its labels, size and crop are used.
        only: Names of the images to keep; None: all.
        already_sized: Whether images of just the classifier's size are left as they are; None: in `clean`,
            as the training does, but not in ImageNet's sets, as nobody does.

    Returns:
        The set, labelled in the classifier's order.

    Raises:
        ValueError: As `open_images`; or the set is one of ImageNet's and the classifier is not, or -A or -R
            has other classes than its 200.
    """
    if name != "clean":
        require_imagenet(classifier, name)
    images = open_images(
        source,
        image_size=classifier.image_size,
        crop_fraction=classifier.crop_fraction,
        interpolation=classifier.interpolation,
        crop_mode=classifier.crop_mode,
        mean=classifier.mean,
        classes=classifier.classes,
        called=numbered() if name == "v2" else None,
        unlabelled=name == "real",
        already_sized=name == "clean" if already_sized is None else already_sized,
        only=only,
    )
    if name in _MASKED:
        _require_own_classes(name, images)
    return images


def _require_own_classes(name: str, images: ImageSet) -> None:
    """Raise `ValueError` for another set than -A or -R: no answer to the other classes could be right."""
    own = {images.classes[label] for label in _subset(name, images.classes).tolist()}
    present = images.present() or ()
    if foreign := [synset for synset in present if synset not in own]:
        raise ValueError(
            f"sets.{name}: {images.source}: {len(foreign)} of its {len(present)} classes are none of the "
            f"{len(own)} of {SETS[name].title}, first {foreign[0]!r}: it is another set"
        )


def _subset(name: str, classes: Sequence[str]) -> Tensor:
    return subset_indices(cast(Literal["a", "r"], name), classes)


def require_imagenet(classifier: Classifier, name: str) -> None:
    """Raise `ValueError` unless the classifier knows all classes of ImageNet; `name` is the set's."""
    classes = classifier.classes or ()
    if missing := len(set(imagenet_synsets()) - set(classes)):
        raise ValueError(
            f"sets.{name}: {classifier.name} lacks {missing} of ImageNet's 1,000 classes: a classifier of "
            "another data set is evaluated on sets.clean"
        )


class SetScore:
    """Counts what is right in a set, batch by batch.

    Args:
        name: One of `SETS`.
        classifier: Whose answers they are.
        image_set: Where the images' names are looked up.

    Raises:
        ValueError: The classifier lacks classes of the set.
    """

    def __init__(self, name: str, classifier: Classifier, image_set: ImageSet) -> None:
        self.name, self._images = name, image_set
        self._counts = {1: Proportion(), 5: Proportion()}
        classes = classifier.classes or ()
        self._real = RealLabels(classes) if name == "real" else None
        if self._real is not None:
            for image in image_set.ids:  # a wrong name is an error now, not in the middle of the pass
                self._real.of(image)
        self._subset = _subset(name, classes) if name in _MASKED else None
        answers = len(classes) if self._subset is None else len(self._subset)
        if 0 < answers <= 5:  # one of five is always among the best five
            del self._counts[5]

    def add(self, logits: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Count a batch of `predict`: shapes (batch, classes), (batch,), (batch,).

        Raises:
            ValueError: A label is none of the set's 200 classes.
        """
        if self._subset is not None and not bool(torch.isin(labels, self._subset).all()):
            raise ValueError(
                f"sets.{self.name}: a label is none of the {len(self._subset)} classes of "
                f"{SETS[self.name].title}: it is another set, or its shards number classes differently"
            )
        for k, count in self._counts.items():
            if self._real is not None:
                answers = logits.topk(min(k, logits.shape[1]), dim=1).indices
                count.add(
                    self._real.right(answers, [self._images.name_of(number) for number in indices.tolist()])
                )
            else:
                count.add(topk(logits, labels, k=k, subset=self._subset))

    def results(self) -> list[dict[str, Any]]:
        """`set`, `metric`, `value` in percent, `n`, `correct`, `low`, `high`, `official_n`.

        The metrics are top1 and, where there are more than five answers, top5.

        Raises:
            ValueError: No image was counted.
        """
        if not self._counts[1].n:
            raise ValueError(
                f"sets.{self.name}: none of its images counts: there is nothing to be right about"
            )
        official = SETS[self.name].images
        return [
            {"set": self.name, "metric": f"top{k}", **count.summary(), "official_n": official}
            for k, count in self._counts.items()
        ]
