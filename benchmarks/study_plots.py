"""Plots of a study: probes over seconds, and what the fine-tuned classifiers reached over seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study_tables import Group, groups, mean_and_deviation, score_names

from aemim_algorithm.evaluation.plots import Point, draw_curves, save_figure

__all__ = ["draw", "grid", "score_title", "shown_scores"]

_PROBES = {"knn": "k-NN", "linear": "linear probe"}
_COLUMNS = 3
_ADVERSARIAL = ("FGSM", "PGD")


def draw(result: Mapping[str, Any], out: Path) -> None:
    """Draw accuracies over the seconds of pre-training, the mean over seeds and a band of one deviation.

    Args:
        result: Of `time_to_accuracy.py`.
        out: PNG file.
    """
    rows = groups(result)
    panels: list[tuple[str, dict[str, list[Point]]]] = [
        (f"{title}, while pre-training", {name: _probes(runs, probe) for name, runs in rows.items()})
        for probe, title in _PROBES.items()
    ]
    panels += [(score_title(score), _by_length(rows, score)) for score in shown_scores(score_names(result))]
    figure, axes = grid(len(panels))
    for axis, (title, curves) in zip(axes, panels, strict=True):
        draw_curves(axis, curves)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("pre-training, s", fontsize=9)
        axis.set_ylabel("top-1 accuracy, %", fontsize=9)
        axis.legend(fontsize=6, frameon=False)
    save_figure(figure, out)


def grid(panels: int) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, in rows of three."""
    rows = -(-panels // _COLUMNS)
    figure = Figure(figsize=(4.6 * _COLUMNS, 3.6 * rows + 0.4), layout="constrained")
    axes = [*figure.subplots(rows, _COLUMNS, squeeze=False).flat]
    for axis in axes[panels:]:
        axis.set_axis_off()
    return figure, axes[:panels]


def _probes(runs: Group, probe: str) -> list[Point]:
    """A method's probes: those of all seeds are of the same batches."""
    length = min(len(run["probes"]) for run in runs)
    points = []
    for number in range(length):
        at = runs[0]["probes"][number]["batch"] * runs[0]["seconds"] / runs[0]["batches"]
        points.append(_point(at, [run["probes"][number][probe] for run in runs]))
    return points


def _by_length(rows: Mapping[str, Group], score: str) -> dict[str, list[Point]]:
    """A curve a method: its runs of all lengths, each with a schedule of its own."""
    curves: dict[str, list[Point]] = {}
    for runs in rows.values():
        values = [run["scores"][score] for run in runs if score in run["scores"]]
        if values:
            curves.setdefault(runs[0]["method"], []).append(_point(runs[0]["seconds"], values))
    return curves


def _point(at: float, values: list[float]) -> Point:
    mean, deviation = mean_and_deviation(values)
    return Point(at, mean) if deviation is None else Point(at, mean, mean - deviation, mean + deviation)


def shown_scores(names: list[str]) -> list[str]:
    """All but what is there twice: budget 0 is the clean accuracy."""
    return [name for name in names if not (name.startswith(_ADVERSARIAL) and name.endswith("ε=0"))]


def score_title(score: str) -> str:
    """What a panel calls a score."""
    return {"finetuned": "fine-tuned, all test images", "corruptions": "fine-tuned, corruptions"}.get(
        score, f"fine-tuned, {score}"
    )
