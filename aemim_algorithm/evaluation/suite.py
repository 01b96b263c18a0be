"""Run a classifier over sets of images: each set is opened before the first is run, and read once.

Opening first means that a wrong path or class name is found in seconds and not after the hours that the
other sets take. Results are rows: `set`, `metric`, `value` in percent, `n`, `correct`, and the 95% interval
`low` to `high`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from aemim_algorithm.classifier import Classifier
from aemim_algorithm.evaluation.image_sets import ImageSet
from aemim_algorithm.evaluation.imagenet import SETS, SetScore, open_set
from aemim_algorithm.evaluation.predict import predict

__all__ = ["SUBSETS", "OpenSets", "Timing", "evaluate_sets", "named_classes", "open_sets", "skipped_sets"]

SUBSETS = ("clean", "imagenet", "real")
"""Sets that a list of images can be given for: the others have other images."""


@dataclass(frozen=True)
class Timing:
    """How long the pass over one set took.

    Attributes:
        images: Images read.
        seconds: Wall-clock.
        share_waiting: Share of it in which the model waited for data, 0 to 1.
    """

    images: int
    seconds: float
    share_waiting: float


@dataclass(frozen=True)
class OpenSets:
    """Sets that are ready to be run.

    Attributes:
        images: The set of each name; sets of one folder are one object.
        classifier: The classifier, with the names of its classes where a set told them.
    """

    images: dict[str, ImageSet]
    classifier: Classifier


def skipped_sets(sources: Mapping[str, str | None]) -> dict[str, str]:
    """Why each set that will not be run is left out.

    Args:
        sources: Path of each set, or None.

    Returns:
        The reason by the set's name.
    """
    reasons = {
        name: "not given" if source is None else f"{source} does not exist"
        for name, source in sources.items()
        if source is None or not Path(source).exists()
    }
    real = sources.get("real")
    if real is not None and "real" not in reasons and Path(real, "index.json").is_file():
        reasons["real"] = f"the shards in {real} hold no file names: give the class folders or a tar of them"
    return reasons


def open_sets(
    classifier: Classifier, sources: Mapping[str, str | None], *, only: Sequence[str] | None = None
) -> OpenSets:
    """Open every set that is there.

    Args:
        classifier: Whose labels and preprocessing they get.
        sources: Path of each of `SETS`, or None.
        only: Names of the images to keep in the sets of `SUBSETS`; None: all.

    Returns:
        The sets, in the order of `SETS`. Where the classifier does not know the names of its classes it gets
        those of `clean`, in sorted order.

    Raises:
        ValueError: A set is not what its name says, or does not fit the classifier.
    """
    missing = skipped_sets(sources)
    names = [name for name in SETS if name in sources and name not in missing]
    opened: dict[str, ImageSet] = {}
    for name in names:
        source = str(sources[name])
        kept = only if name in SUBSETS else None
        twin = next((other for other in opened if _same(sources[other], source, name, other)), None)
        opened[name] = opened[twin] if twin else open_set(name, source, classifier, only=kept)
        if not len(opened[name]):
            raise ValueError(f"sets.{name}: {source} holds no images")
        if name == "clean":
            classifier = named_classes(classifier, opened[name])
    return OpenSets(opened, classifier)


def named_classes(classifier: Classifier, image_set: ImageSet) -> Classifier:
    """A classifier that knows no names takes those of the set that it is evaluated on, in sorted order."""
    return classifier if classifier.classes is not None else replace(classifier, classes=image_set.classes)


def _same(one: str | None, other: str, name: str, twin: str) -> bool:
    """Only ImageNet and -Real: what else is one folder would be another set by mistake."""
    shared = {name, twin} == {"imagenet", "real"}
    return shared and one is not None and Path(one).resolve() == Path(other).resolve()


def evaluate_sets(
    opened: OpenSets,
    *,
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | str = "cpu",
    precision: Literal["fp32", "amp_bf16"] = "fp32",
    progress: bool = False,
    finished: Callable[[list[dict[str, Any]], dict[str, Timing]], None] = lambda rows, timings: None,
) -> tuple[list[dict[str, Any]], dict[str, Timing]]:
    """Top-1 and top-5 on each set; images stream, so memory does not depend on their number.

    Args:
        opened: See `open_sets`.
        batch_size: As for `predict`, like `workers`, `device` and `precision`.
        workers: See `batch_size`.
        device: See `batch_size`.
        precision: See `batch_size`.
        progress: Show a bar on stderr.
        finished: Called after each pass but the last with what has been measured so far.

    Returns:
        The rows of all sets, see `SetScore.results`, and the time of each pass by the names of its sets, such
        as "imagenet+real".

    Raises:
        ValueError: An image or a label is bad, or the classifier's output is.
    """
    scores = {name: SetScore(name, opened.classifier, image_set) for name, image_set in opened.images.items()}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in scores}
    timings: dict[str, Timing] = {}
    passes = list(dict.fromkeys(opened.images.values()))
    for image_set in passes:
        names = [name for name, other in opened.images.items() if other is image_set]
        predictions = predict(
            opened.classifier,
            image_set,
            batch_size=batch_size,
            workers=workers,
            device=device,
            precision=precision,
        )
        bar = _bar(predictions, "+".join(names), len(image_set), batch_size, shown=progress)
        for logits, labels, indices in bar:
            for name in names:
                scores[name].add(logits, labels, indices)
        seconds = round(predictions.seconds, 3)
        timings["+".join(names)] = Timing(predictions.images, seconds, round(predictions.share_waiting, 4))
        rows |= {name: scores[name].results() for name in names}
        if image_set is not passes[-1]:
            finished([row for some in rows.values() for row in some], timings)
    return [row for some in rows.values() for row in some], timings


def _bar(
    predictions: Iterable[tuple[Tensor, Tensor, Tensor]],
    title: str,
    images: int,
    batch_size: int,
    *,
    shown: bool,
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    batches = -(-images // batch_size)
    return tqdm(predictions, title, batches, unit="batch", file=sys.stderr, disable=not shown)
