"""Whether two results are of the same corrupted images: only then is one's error relative to the other's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from aemim_algorithm.classifier import Classifier
from aemim_algorithm.evaluation.corruption_error import error_relative_to
from aemim_algorithm.evaluation.corruptions.apply import Images, corrupted_sets
from aemim_algorithm.evaluation.corruptions.parameters import CORRUPTIONS, SEVERITIES

__all__ = ["check_baseline", "errors_of", "require_same", "shared_settings"]


def check_baseline(
    baseline: Mapping[str, Any],
    classifier: Classifier,
    images: Images,
    *,
    table: str,
    seed: int,
    severities: Iterable[int] = SEVERITIES,
    corruptions: Iterable[str] = CORRUPTIONS,
    precision: str = "fp32",
) -> None:
    """Look whether a baseline is of just the same corrupted images, without reading one.

    Args:
        baseline: As for `evaluate_corruptions`, like all others.
        classifier: See `baseline`.
        images: See `baseline`.
        table: See `baseline`.
        seed: See `baseline`.
        severities: See `baseline`.
        corruptions: See `baseline`.
        precision: See `baseline`.

    Raises:
        ValueError: It is of other corruptions, severities, images, size or precision, or makes no error.
    """
    sets = corrupted_sets(images, table=table, seed=seed, severities=severities, corruptions=corruptions)
    settings = shared_settings(classifier, images, table=table, seed=seed, precision=precision)
    require_same(baseline, settings, set(sets))


def errors_of(result: Mapping[str, Any]) -> dict[str, list[float]]:
    """The errors in a result of `evaluate_corruptions` or `evaluate_imagenet_c`, also one read from JSON.

    Args:
        result: With its ``accuracy``.

    Returns:
        Corruption -> errors in percent, by rising severity.
    """
    return {
        name: [100 - by_severity[key]["value"] for key in sorted(by_severity, key=int)]
        for name, by_severity in result["accuracy"].items()
    }


def shared_settings(
    classifier: Classifier, images: Images, *, table: str, seed: int, precision: str
) -> dict[str, str | int]:
    """What two results must share to be of the same corrupted images."""
    names = hashlib.sha256("\n".join(images.ids).encode()).hexdigest()
    return {
        "table": table,
        "seed": seed,
        "n": len(images),
        "images": names,
        "image_size": classifier.image_size,
        "precision": precision,
    }


def require_same(
    baseline: Mapping[str, Any], settings: Mapping[str, str | int], sets: set[tuple[str, int]]
) -> None:
    """Raise `ValueError` unless a baseline is of these settings and of these (corruption, severity)."""
    for name, value in settings.items():
        if baseline.get(name) != value:
            raise ValueError(
                f"baseline: its {name} is {baseline.get(name)!r}, expected {value!r} as here: "
                "a relative error is of the same corrupted images"
            )
    try:
        errors = errors_of(baseline)
        found = {(name, int(key)) for name, row in baseline["accuracy"].items() for key in row}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError("baseline: expected the results of corruptions of `aemim evaluate`") from error
    if different := sorted(found ^ sets):
        name, severity = different[0]
        raise ValueError(
            f"baseline: only one of the two has {name}/{severity}: a relative error is of the same "
            "corruptions and severities"
        )
    error_relative_to(errors, errors)  # that it makes an error on each is to be known now
