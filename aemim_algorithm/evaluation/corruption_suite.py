"""Accuracy of a classifier under each corruption and severity, and what follows from it.

Images are read, corrupted and classified batch by batch; only counts are kept. Costs up to 75 passes over
the images: on-the-fly corruptions of 224-pixel images take 1 to 30 ms each, of 32 pixels 0.1 to 1.5 ms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Unpack

from torch import Tensor
from torch.utils.data import Dataset

from aemim_algorithm.classifier import Classifier
from aemim_algorithm.evaluation.corruption_baseline import errors_of, require_same, shared_settings
from aemim_algorithm.evaluation.corruption_error import (
    ALEXNET_ERRORS,
    error_relative_to,
    mean_corruption_error,
    unnormalised_error,
)
from aemim_algorithm.evaluation.corruptions.apply import Images, corrupted_sets
from aemim_algorithm.evaluation.corruptions.parameters import CORRUPTIONS, SEVERITIES
from aemim_algorithm.evaluation.imagenet_c import (
    OFFICIAL_IMAGES,
    check_classes,
    find_imagenet_c,
    how_sized,
    missing_from_imagenet_c,
    open_imagenet_c,
    why_incomplete,
)
from aemim_algorithm.evaluation.predict import Clock, PassOptions, predict
from aemim_algorithm.evaluation.scores import Proportion, top1

__all__ = [
    "corruption_accuracies",
    "evaluate_corruptions",
    "evaluate_imagenet_c",
]

Sample = tuple[Tensor, int, int]
Progress = Callable[[str], None]


def evaluate_corruptions(
    classifier: Classifier,
    images: Images,
    *,
    table: str,
    seed: int,
    severities: Iterable[int] = SEVERITIES,
    corruptions: Iterable[str] = CORRUPTIONS,
    baseline: Mapping[str, Any] | None = None,
    progress: Progress = lambda line: None,
    **options: Unpack[PassOptions],
) -> dict[str, Any]:
    """Corrupt a clean set on the fly and evaluate.

    Args:
        classifier: The classifier.
        images: The clean images, of its size and with its labels.
        table: Strengths, "imagenet" (images of 224 pixels) or "cifar" (32).
        seed: Of the corruptions' randomness.
        severities: Some of 1 to 5.
        corruptions: Some of `CORRUPTIONS`.
        baseline: What this function returned for another classifier on the same images, or None.
        progress: Called with a line for each finished set.
        **options: Of `predict`.

    Returns:
        Ready for JSON: ``accuracy`` (corruption -> severity -> value, n, correct, low, high of the 95% Wilson
        interval, in percent, and share_waiting, of the time), ``error`` (corruption -> mean over severities),
        ``unnormalised_error`` (mean of those), ``intervals`` (its 95% interval), ``mCE`` (None, with
        ``why_no_mCE``), ``relative_to_baseline`` (None without one), ``preprocessing``, ``timing``, and what
        a baseline has to share: ``seed``, ``table``, ``n``, ``images`` (a digest of their names),
        ``image_size`` and ``precision``.

    Raises:
        ValueError: An argument is out of range, or the baseline is of other corruptions or images.
    """
    sets = corrupted_sets(images, table=table, seed=seed, severities=severities, corruptions=corruptions)
    precision = options.get("precision", "fp32")
    settings = shared_settings(classifier, images, table=table, seed=seed, precision=precision)
    if baseline is not None:
        require_same(baseline, settings, set(sets))
    clock = Clock()
    accuracy = corruption_accuracies(
        classifier,
        sets.items(),
        progress=progress,
        clock=clock,
        **options,
    )
    errors = errors_of({"accuracy": accuracy})
    weights = _weights(accuracy)
    return {
        "accuracy": accuracy,
        "error": {name: fmean(values) for name, values in errors.items()},
        "unnormalised_error": unnormalised_error(errors),
        "intervals": {"unnormalised_error": _interval(accuracy, weights)},
        "relative_to_baseline": None if baseline is None else error_relative_to(errors_of(baseline), errors),
        "mCE": None,
        "why_no_mCE": "AlexNet's errors are known for the official images of ImageNet-C, not for these",
        "preprocessing": f"corrupted on the fly after resize and crop, strengths for {table} images",
        "timing": clock.as_dict(),
        **settings,
    }


def evaluate_imagenet_c(
    classifier: Classifier,
    root: str | Path,
    *,
    classes: Sequence[str] | None,
    called: Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
    progress: Progress = lambda line: None,
    **options: Unpack[PassOptions],
) -> dict[str, Any]:
    """Evaluate on the official folders of ImageNet-C.

    Args:
        classifier: The classifier.
        root: Where the archives were unpacked.
        classes: Class names in the classifier's order, see `open_images`.
        called: Class of each folder name, see `open_images`.
        only: Names of the images to keep; None: all.
        progress: Called with a line for each finished set.
        **options: Of `predict`.

    Returns:
        Ready for JSON: ``accuracy`` and ``error`` as `evaluate_corruptions`; ``mCE``, ``corruption_error``
        (corruption -> CE, in percent of AlexNet's error) and ``unnormalised_error``, all three None if one of
        the 75 folders is missing, which ``why_no_mCE`` then says; ``intervals``, their 95% intervals;
        ``missing``, the names of such folders; ``incomplete``, why nothing of it is to be compared with
        published numbers (None: it is); ``official_n`` of a folder; ``preprocessing``; ``timing``.

    Raises:
        ValueError: None of the folders is there, or a set cannot be read.
    """
    found = find_imagenet_c(root)
    missing = missing_from_imagenet_c(found)
    if classes is not None:
        check_classes(found, classes=classes, called=called)
    sets = open_imagenet_c(
        found,
        image_size=classifier.image_size,
        interpolation=classifier.interpolation,
        classes=classes,
        called=called,
        only=only,
    )
    clock = Clock()
    accuracy = corruption_accuracies(
        classifier,
        sets,
        progress=progress,
        clock=clock,
        **options,
    )
    errors = errors_of({"accuracy": accuracy})
    counts = [int(cell["n"]) for cells in accuracy.values() for cell in cells.values()]
    scores = None if missing else mean_corruption_error(errors)
    return {
        "accuracy": accuracy,
        "error": {name: fmean(values) for name, values in errors.items()},
        "unnormalised_error": scores["unnormalised"] if scores else None,
        "mCE": scores["mCE"] if scores else None,
        "corruption_error": scores["per_corruption"] if scores else None,
        "why_no_mCE": f"missing: {', '.join(missing)}" if missing else None,
        "intervals": {
            "unnormalised_error": _interval(accuracy, _weights(accuracy)),
            "mCE": _interval(accuracy, {name: 100 / (75 * ALEXNET_ERRORS[name]) for name in accuracy}),
        }
        if scores
        else {},
        "missing": missing,
        "incomplete": why_incomplete(counts, image_size=classifier.image_size, missing=missing),
        "official_n": OFFICIAL_IMAGES,
        "preprocessing": how_sized(classifier.image_size),
        "timing": clock.as_dict(),
    }


def corruption_accuracies(
    classifier: Classifier,
    sets: Iterable[tuple[tuple[str, int], Dataset[Sample]]],
    *,
    progress: Progress = lambda line: None,
    clock: Clock | None = None,
    **options: Unpack[PassOptions],
) -> dict[str, dict[str, dict[str, float | int]]]:
    """Top-1 accuracy on each set, one after the other.

    Args:
        classifier: The classifier.
        sets: (corruption, severity) and the corrupted images.
        progress: Called with a line for each finished set.
        clock: Is told the time of all sets.
        **options: Of `predict`.

    Returns:
        Corruption -> severity, as a string like JSON's keys -> ``value`` in percent, ``n``, ``correct``,
        ``low`` and ``high`` of the 95% Wilson interval, and ``share_waiting``, of the time, 0 to 1.

    Raises:
        ValueError: A set or the classifier's logits are bad.
    """
    accuracy: dict[str, dict[str, dict[str, float | int]]] = {}
    for (name, severity), images in sets:
        right = Proportion()
        batches = predict(classifier, images, **options)
        for logits, labels, _ in batches:
            right.add(top1(logits, labels))
        if clock is not None:
            clock.add(batches)
        scores = {**right.summary(), "share_waiting": batches.share_waiting}
        accuracy.setdefault(name, {})[str(severity)] = scores
        progress(f"{name}, severity {severity}: {scores['value']:.2f}% of {scores['n']} images")
    return accuracy


def _weights(accuracy: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How much one set of each corruption counts in the unnormalised mean."""
    return {name: 1 / (len(accuracy) * len(cells)) for name, cells in accuracy.items()}


def _interval(
    accuracy: Mapping[str, Mapping[str, Mapping[str, float]]], weights: Mapping[str, float]
) -> tuple[float, float]:
    """The 95% interval of a weighted sum of errors, as if each set were drawn on its own.

    Its half width is the root of sum (w h)^2, where h is half of a set's Wilson interval. The folders share
    their images, so their errors go together, and the true interval is wider.
    """
    cells = [(weights[name], cell) for name, row in accuracy.items() for cell in row.values()]
    centre = sum(weight * (100 - cell["value"]) for weight, cell in cells)
    half = math.sqrt(sum((weight * (cell["high"] - cell["low"]) / 2) ** 2 for weight, cell in cells))
    most = sum(100 * weight for weight, _ in cells)
    return max(0.0, centre - half), min(most, centre + half)
