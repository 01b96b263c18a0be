"""Three answers to how good frozen features are, each with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from aemim_algorithm.evaluation.feature_cache import Split
from aemim_algorithm.evaluation.knn import knn_accuracy
from aemim_algorithm.evaluation.linear_probe import linear_probe_accuracy
from aemim_algorithm.evaluation.mae_probe import MaeProbe, mae_probe_accuracy
from aemim_algorithm.evaluation.scores import wilson_interval
from aemim_algorithm.validation import require_choice

__all__ = ["METHODS", "Method", "ProbeSettings", "probe"]

Method = Literal["knn", "logistic", "mae"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """How features are probed.

    Attributes:
        k: Neighbours that vote.
        temperature: Of their votes.
        weight_decay: Of the logistic regression.
        mae: Of the MAE paper's linear probe.
    """

    k: int = 20
    temperature: float = 0.07
    weight_decay: float = 1e-3
    mae: MaeProbe = field(default_factory=MaeProbe)


def probe(
    train: Split,
    test: Split,
    *,
    methods: Sequence[Method] = METHODS,
    settings: ProbeSettings | None = None,
) -> list[dict[str, Any]]:
    """Score frozen features.

    Args:
        train: What the probes learn from.
        test: What they are scored on.
        methods: ``"knn"``: weighted nearest neighbours, which trains nothing; ``"logistic"``: multinomial
            logistic regression at its optimum; ``"mae"``: the linear probe as the MAE paper trains it.
        settings: Of these methods.

    Returns:
        One row for each: ``set`` ("probe"), ``metric``, top-1 ``value`` in percent, ``n``, ``correct`` and
        the 95% interval ``low`` to ``high``, which is that of other test images, not of other seeds.

    Raises:
        ValueError: If a method is unknown, or the features do not fit a setting.
    """
    for method in methods:
        require_choice("methods", method, METHODS)
    chosen = settings or ProbeSettings()
    return [_row(method, _accuracy(method, chosen, train, test), len(test.labels)) for method in methods]


def _accuracy(method: Method, settings: ProbeSettings, train: Split, test: Split) -> float:
    """Top-1 in percent."""
    tensors = train.features, train.labels, test.features, test.labels
    match method:
        case "knn":
            return knn_accuracy(*tensors, k=settings.k, temperature=settings.temperature)
        case "logistic":
            return linear_probe_accuracy(*tensors, weight_decay=settings.weight_decay)
        case "mae":
            return mae_probe_accuracy(*tensors, settings.mae)


def _row(method: Method, accuracy: float, n: int) -> dict[str, Any]:
    correct = round(accuracy * n / 100)
    low, high = wilson_interval(correct, n)
    return {
        "set": "probe",
        "metric": method,
        "value": 100 * correct / n,
        "n": n,
        "correct": correct,
        "low": low,
        "high": high,
    }
