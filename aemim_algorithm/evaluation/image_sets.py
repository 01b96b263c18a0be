"""Labelled images to evaluate on: class folders, a tar of them, CIFAR-10, or MDS shards.

Images are decoded by the decoder of training and then resized and cropped by timm's evaluation transform,
which works on Pillow images. Pillow's resize is the one that published numbers were made with; a resize of
tensors is up to a few grey levels apart. See `EvaluationView`.

Classes are matched by name, never by position: a folder of shards or images whose classes come in another
order than the classifier's gets the classifier's labels, and a name that the classifier does not know is
an error.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from aemim_algorithm.data.damage import read_sample
from aemim_algorithm.data.index import open_samples
from aemim_algorithm.data.shards import DESCRIPTION
from aemim_algorithm.data.sources import open_source
from aemim_algorithm.data.streaming import class_names
from aemim_algorithm.data.transforms import decode
from aemim_algorithm.evaluation.image_ids import select
from aemim_algorithm.evaluation.view import EvaluationView
from aemim_algorithm.validation import nearest

__all__ = ["ImageSet", "Sample", "open_images"]

Sample = tuple[Tensor, int, int]


@dataclass(frozen=True)
class _Listing:
    """A set as it is stored: the name of each image, the name of each of its classes, a reader."""

    source: str
    ids: Sequence[str]
    classes: tuple[str, ...] | None  # None: not recorded, labels are positions
    read: Callable[[int], tuple[Tensor, int]]


class ImageSet(Dataset[Sample]):
    """Images of one size, with labels in a classifier's order. Made by `open_images`.

    An item is (image, label, number): image uint8 of shape (3, image_size, image_size), the label a
    position in `classes`, and the image's number among all images of the source. That number stays the same
    where only some of the images are kept, so noise that is drawn from it does as well.

    Attributes:
        source: Where the images are.
        classes: Class names by label.
        ids: Name of each image of this set: its path within the source, or its number in MDS shards.
    """

    def __init__(
        self,
        listing: _Listing,
        view: EvaluationView,
        *,
        classes: tuple[str, ...],
        label_of: Mapping[int, int] | None,
        positions: Sequence[int] | None,
    ) -> None:
        self.source, self.classes = listing.source, classes
        self.ids = listing.ids if positions is None else [listing.ids[i] for i in positions]
        self._listing, self._view = listing, view
        self._label_of, self._positions = label_of, positions

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        number = range(len(self))[index] if self._positions is None else self._positions[index]
        image, label = self._listing.read(number)
        return self._view(image), self._label(label, number), number

    def present(self) -> list[str] | None:
        """The set's own classes, by the names of `classes`; None: not recorded."""
        return None if self._label_of is None else [self.classes[label] for label in self._label_of.values()]

    def name_of(self, number: int) -> str:
        """Name of the image of a number, the third of an item."""
        return self._listing.ids[number]

    def _label(self, label: int, number: int) -> int:
        if self._label_of is not None:
            return self._label_of[label]
        if not 0 <= label < len(self.classes):
            raise ValueError(
                f"{self.source}: sample {self.name_of(number)} has label {label}, expected 0 to "
                f"{len(self.classes) - 1}: the set is of other classes than the classifier"
            )
        return label


def open_images(
    source: str | Path,
    *,
    image_size: int,
    crop_fraction: float = 1.0,
    interpolation: str = "bicubic",
    crop_mode: str = "center",
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    classes: Sequence[str] | None = None,
    called: Mapping[str, str] | None = None,
    unlabelled: bool = False,
    already_sized: bool = False,
    only: Sequence[str] | None = None,
) -> ImageSet:
    """Open a set of labelled images; reads the listing now and each image when it is asked for.

    Args:
        source: A folder of class folders, a `.tar` of one, a folder that holds CIFAR-10 as torchvision
            keeps it (its test part), or a folder of MDS shards.
        image_size: As for `EvaluationView`, like `crop_fraction`, `interpolation`, `crop_mode`, `mean`
            and `already_sized`.
        crop_fraction: See `image_size`.
        interpolation: See `image_size`.
        crop_mode: See `image_size`.
        mean: See `image_size`.
        classes: Class names in the classifier's order; None: those of the set, in sorted order.
        called: Class of a folder whose name is not the class's; a folder not in it is named by its class.
        unlabelled: Labels come from elsewhere: any folder is allowed, and every label is 0.
        already_sized: See `image_size`.
        only: Names of the images to keep, see `image_ids.select`; None: all.

    Returns:
        The set, in the order of the names or of the shards.

    Raises:
        ValueError: There is no such set, it is damaged, its classes are not among `classes`, or `only`
            names what is not there. Reading an image that is broken or has a label outside of the
            classes raises it too; each message is one line.
    """
    listing = _list_shards(Path(source)) if Path(source, "index.json").is_file() else _list(Path(source))
    view = EvaluationView(
        image_size,
        crop_fraction=crop_fraction,
        interpolation=interpolation,
        crop_mode=crop_mode,
        already_sized=already_sized,
        mean=mean,
    )
    positions = None if only is None else select(listing.ids, only, where=listing.source)
    if unlabelled:
        nothing = dict.fromkeys(range(len(listing.classes or ())), 0)
        return ImageSet(
            listing, view, classes=("",), label_of=nothing if listing.classes else None, positions=positions
        )
    names = tuple(classes) if classes is not None else _own_classes(listing)
    label_of = None if listing.classes is None else _match(listing, names, called or {})
    return ImageSet(listing, view, classes=names, label_of=label_of, positions=positions)


def _own_classes(listing: _Listing) -> tuple[str, ...]:
    if listing.classes is None:
        raise ValueError(
            f"{listing.source} has no {DESCRIPTION}, so the names of its classes are unknown: write the "
            "shards with `aemim data`, or evaluate a classifier that knows its classes"
        )
    return listing.classes


def _match(listing: _Listing, classes: tuple[str, ...], called: Mapping[str, str]) -> dict[int, int]:
    """The classifier's label of each label of the set, by name."""
    label = {name: position for position, name in enumerate(classes)}
    found = {name: called.get(name, name) for name in listing.classes or ()}
    unknown = [name for name, meaning in found.items() if meaning not in label]
    if unknown:
        close = nearest(unknown[0], classes)
        hint = f"did you mean {close!r}?" if close else f"expected names such as {classes[0]!r}"
        raise ValueError(
            f"{listing.source}: {len(unknown)} of its {len(found)} class names are none of the "
            f"classifier's {len(classes)}, first {unknown[0]!r}; {hint}"
        )
    return {position: label[meaning] for position, meaning in enumerate(found.values())}


def _list(source: Path) -> _Listing:
    """A folder or a tar, listed without opening an image."""
    if source.name.lower().endswith((".tar.gz", ".tgz")):
        raise ValueError(f"{source} is compressed: unpack it, as images are read in no fixed order")
    with tempfile.TemporaryDirectory() as scratch:  # only a compressed tar would be unpacked there
        found = open_source(source, split="test", scratch=Path(scratch))
    if not found.names:
        raise ValueError(f"{source}: no images in class folders, expected <class>/<file>")
    # Beside the class folders there is a README in ImageNet-A and -R; within them nothing may be left out.
    if lost := [(name, reason) for name, reason in found.rejected if "/" in name]:
        raise ValueError(f"{source}: {len(lost)} entries cannot be images, first {lost[0][0]} ({lost[0][1]})")

    def read(position: int) -> tuple[Tensor, int]:
        try:
            return decode(found.read(position)), found.labels[position]
        except (ValueError, OSError) as error:
            raise ValueError(f"{source}: {found.names[position]}: {error}") from error

    return _Listing(str(source), found.names, found.classes, read)


class _Numbers(Sequence[str]):
    """The numbers 0 to count - 1 as names, without a list of them."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return str(range(self._count)[index])


def _list_shards(folder: Path) -> _Listing:
    samples = open_samples(folder)

    def read(position: int) -> tuple[Tensor, int]:
        return read_sample(samples, position, samples.get_item)

    classes = tuple(class_names(folder)) if (folder / DESCRIPTION).is_file() else None
    return _Listing(str(folder), _Numbers(len(samples)), classes, read)
