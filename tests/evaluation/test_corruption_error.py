"""The mCE: AlexNet is 100, known errors give hand-computed values, and nothing incomplete is scored."""

from __future__ import annotations

import pytest

from aemim_algorithm.evaluation.corruption_error import (
    ALEXNET_ERRORS,
    error_relative_to,
    mean_corruption_error,
    unnormalised_error,
)
from aemim_algorithm.evaluation.corruptions import CORRUPTIONS

# AlexNet's errors at severities 1 to 5, from github.com/hendrycks/robustness/issues/10.
BY_SEVERITY = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.9487, 0.9872, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.5843, 0.70048, 0.82108, 0.8975, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.9187, 0.94952),
    "frost": (0.6139, 0.79734, 0.8879, 0.89942, 0.9343),
    "fog": (0.67474, 0.7605, 0.84378, 0.8726, 0.945),
    "brightness": (0.4514, 0.48502, 0.54048, 0.62166, 0.7244),
    "contrast": (0.64548, 0.7615, 0.88874, 0.9776, 0.9927),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.5462, 0.73728, 0.87092, 0.91262),
}


def flat(error: float) -> dict[str, list[float]]:
    return {name: [error] * 5 for name in CORRUPTIONS}


@pytest.mark.parametrize("name", BY_SEVERITY)
def test_alexnets_mean_is_that_of_its_severities(name: str) -> None:
    assert ALEXNET_ERRORS[name] == pytest.approx(100 * sum(BY_SEVERITY[name]) / 5, abs=1e-9)


def test_alexnet_itself_is_100_and_half_its_errors_are_50() -> None:
    errors = {name: [error + step for step in (-2, -1, 0, 1, 2)] for name, error in ALEXNET_ERRORS.items()}
    scores = mean_corruption_error(errors)
    assert scores["mCE"] == pytest.approx(100)
    assert scores["unnormalised"] == pytest.approx(sum(ALEXNET_ERRORS.values()) / 15)
    halved = mean_corruption_error({name: [error / 2] * 5 for name, error in ALEXNET_ERRORS.items()})
    assert halved["mCE"] == pytest.approx(50)
    assert set(halved["per_corruption"]) == set(CORRUPTIONS)


def test_hand_computed() -> None:
    errors = flat(0.0) | {"brightness": [10, 20, 30, 40, 50], "fog": [0, 0, 0, 0, 100]}
    scores = mean_corruption_error(errors)
    assert scores["per_corruption"]["brightness"] == pytest.approx(100 * 150 / (5 * 56.4592))
    assert scores["per_corruption"]["fog"] == pytest.approx(100 * 100 / (5 * 81.9324))
    assert scores["mCE"] == pytest.approx((53.13571 + 24.41037) / 15, abs=1e-4)
    assert scores["unnormalised"] == pytest.approx((30 + 20) / 15)


def test_relative_to_a_baseline_of_the_same_corruptions() -> None:
    relative = error_relative_to({"fog": [20, 40], "snow": [50, 50]}, {"fog": [30, 30], "snow": [10, 15]})
    assert relative == {
        "mean": pytest.approx(62.5),
        "per_corruption": pytest.approx({"fog": 100, "snow": 25}),
    }
    assert unnormalised_error({"fog": [30, 30], "snow": [10, 15]}) == pytest.approx(21.25)


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ({name: [1.0] * 5 for name in CORRUPTIONS[1:]}, "no errors of 1 corruptions, first 'gaussian_noise'"),
        (flat(1.0) | {"fog": [1.0] * 4}, "fog: got errors at 4 severities, expected 5"),
        (flat(1.0) | {"elastic": [1.0] * 5}, "did you mean 'elastic_transform'"),
        (flat(1.0) | {"fog": [1.0] * 4 + [101.0]}, "fog: got an error of 101.0"),
        (flat(1.0) | {"fog": [1.0] * 4 + [float("nan")]}, "fog: got an error of nan"),
        ({}, "errors: got none"),
    ],
)
def test_incomplete_or_impossible_errors_are_refused(errors: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        mean_corruption_error(errors)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        (
            {"fog": [10.0]},
            r"not of the same corruptions and severities \(1 severities against|2 severities against 1",
        ),
        ({"snow": [10.0, 20.0]}, r"corruptions and severities \(fog\)"),
        ({"fog": [0.0, 0.0]}, "makes no error on 'fog'"),
    ],
)
def test_a_baseline_that_does_not_fit_is_refused(baseline: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        error_relative_to(baseline, {"fog": [10.0, 20.0]})
