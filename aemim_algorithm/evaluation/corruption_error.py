"""Mean corruption error (mCE): how wrong a classifier is on corrupted images, over how wrong AlexNet is.

Hendrycks and Dietterich, arXiv 1903.12261, section 4.2: CE_c = sum_s E_{s,c} / sum_s E_{s,c}(AlexNet), and
mCE is the mean of the 15. Without AlexNet it is another number, the unnormalised mean error: that of MAE's
ViT-B, for instance, is 37.8 where its mCE is 51.7 (github.com/facebookresearch/mae/issues/104).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TypedDict

from aemim_algorithm.evaluation.corruptions.parameters import CORRUPTIONS, SEVERITIES
from aemim_algorithm.validation import nearest

__all__ = [
    "ALEXNET_ERRORS",
    "CorruptionError",
    "ErrorRelativeTo",
    "error_relative_to",
    "mean_corruption_error",
    "unnormalised_error",
]

# Top-1 error in percent, mean of the five severities, on the official ImageNet-C. The authors published them
# for each severity in github.com/hendrycks/robustness/issues/10; the means also stand in the authors' code of
# AugMix, github.com/google-research/augmix, imagenet.py.
ALEXNET_ERRORS = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}


class CorruptionError(TypedDict):
    """All in percent; 100 is as wrong as AlexNet for `mCE` and `per_corruption`."""

    mCE: float
    per_corruption: dict[str, float]
    unnormalised: float


class ErrorRelativeTo(TypedDict):
    """In percent of the baseline's error; 100 is as wrong as the baseline."""

    mean: float
    per_corruption: dict[str, float]


def mean_corruption_error(errors: Mapping[str, Sequence[float]]) -> CorruptionError:
    """The mCE of a classifier on the official ImageNet-C.

    Args:
        errors: Corruption -> top-1 error in percent at severities 1 to 5; all 15 corruptions.

    Returns:
        ``mCE``, the corruption error of each corruption, and the ``unnormalised`` mean of all 75 errors.

    Raises:
        ValueError: A corruption or a severity is missing or unknown, or an error is not within [0, 100].
    """
    _check(errors, severities=len(SEVERITIES))
    if missing := [name for name in CORRUPTIONS if name not in errors]:
        raise ValueError(
            f"got no errors of {len(missing)} corruptions, first {missing[0]!r}: mCE is defined over all 15, "
            "the unnormalised mean over any of them"
        )
    relative = {name: 100 * fmean(errors[name]) / ALEXNET_ERRORS[name] for name in CORRUPTIONS}
    return {
        "mCE": fmean(list(relative.values())),
        "per_corruption": relative,
        "unnormalised": unnormalised_error(errors),
    }


def unnormalised_error(errors: Mapping[str, Sequence[float]]) -> float:
    """Mean error over corruptions, of each the mean over its severities; not mCE.

    Args:
        errors: Corruption -> top-1 error in percent at some severities, for each the same.

    Returns:
        In percent.

    Raises:
        ValueError: A name is unknown, severities differ in number, or an error is not within [0, 100].
    """
    _check(errors)
    return fmean([fmean(values) for values in errors.values()])


def error_relative_to(
    baseline: Mapping[str, Sequence[float]], errors: Mapping[str, Sequence[float]]
) -> ErrorRelativeTo:
    """As mCE, but over the errors of another classifier on the same images, instead of AlexNet's.

    For data sets on which AlexNet's errors are not published, such as CIFAR-10 with corruptions.

    Args:
        baseline: The other classifier's, as ``errors``.
        errors: Corruption -> top-1 error in percent at some severities.

    Returns:
        ``mean`` and ``per_corruption``, in percent of the baseline's error.

    Raises:
        ValueError: The two are not of the same corruptions and number of severities, an error is not within
            [0, 100], or the baseline makes no error on a corruption.
    """
    _check(errors)
    _check(baseline)
    count, expected = len(next(iter(errors.values()))), len(next(iter(baseline.values())))
    if set(errors) != set(baseline) or count != expected:
        only_one = sorted(set(errors) ^ set(baseline))
        raise ValueError(
            "errors and baseline are not of the same corruptions and severities "
            f"({only_one[0] if only_one else f'{count} severities against {expected}'}): evaluate both alike"
        )
    if perfect := [name for name, values in baseline.items() if not any(values)]:
        raise ValueError(f"the baseline makes no error on {perfect[0]!r}: nothing can be relative to that")
    relative = {name: 100 * fmean(errors[name]) / fmean(baseline[name]) for name in errors}
    return {"mean": fmean(list(relative.values())), "per_corruption": relative}


def _check(errors: Mapping[str, Sequence[float]], *, severities: int | None = None) -> None:
    if not errors:
        raise ValueError("errors: got none; expected a list of errors for each corruption")
    expected = len(next(iter(errors.values()))) if severities is None else severities
    for name, values in errors.items():
        if name not in CORRUPTIONS:
            close = nearest(name, CORRUPTIONS)
            raise ValueError(
                f"{name!r} is no corruption of ImageNet-C" + (f"; did you mean {close!r}?" if close else "")
            )
        if len(values) != expected or not expected:
            raise ValueError(
                f"{name}: got errors at {len(values)} severities, expected {expected or 'at least 1'}"
            )
        for value in values:
            if not (math.isfinite(value) and 0 <= value <= 100):
                raise ValueError(f"{name}: got an error of {value!r}, expected percent within [0, 100]")
