"""The plots of `aemim report`: losses of both branches, the sweep of λ, accuracy over training time.

Each function draws if there is something to draw, and says whether it did.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aemim_algorithm.evaluation.plots import COLOURS, Point, accuracy_over_budget, draw_curves, save_figure
from aemim_algorithm.evaluation.runs import Run

__all__ = ["plot_accuracy_over_time", "plot_attack", "plot_loss_ratio_sweep", "plot_losses", "smoothed"]

_WINDOWS = 200  # points of a loss curve
_SHOWN = 6  # scores in one figure
_STYLES = {"loss/train/clean": "-", "loss/train/adversarial": "--", "loss/train/total": "-"}


def plot_losses(runs: Sequence[Run], out: Path) -> bool:
    """Draw the clean and the adversarial loss over batches, as Figure 2 of the paper.

    Args:
        runs: The runs; one without AEMIM, of whatever kind, has one loss.
        out: PNG file.

    Returns:
        Whether there was a loss to draw.
    """
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axis = figure.add_subplot()
    for number, run in enumerate(runs):
        names = [name for name in _STYLES if any(name in line for line in run.batches)]
        if "loss/train/clean" in names:
            names.remove("loss/train/total")
        for name in names:
            places, values = _loss(run, name)
            only = name == "loss/train/total"
            label = run.name if only else f"{run.name}, {name.rpartition('/')[2]}"
            colour = COLOURS[number % len(COLOURS)]
            axis.plot(places, values, _STYLES[name], color=colour, linewidth=1.4, label=label)
    if not axis.lines:
        return False
    _finish(axis, "batch", "loss")
    axis.set_title("Training losses")
    axis.legend(frameon=False, fontsize=8)
    save_figure(figure, out)
    return True


def plot_loss_ratio_sweep(runs: Sequence[Run], out: Path) -> bool:
    """Draw scores over λ, as Figure 4 of the paper.

    Args:
        runs: The runs; those without AEMIM are left out.
        out: PNG file.

    Returns:
        Whether two runs with scores differ in λ.
    """
    swept = [run for run in runs if run.loss_ratio is not None]
    names = _score_names(swept)[:_SHOWN]
    curves = {
        name: [
            score._replace(at=float(run.loss_ratio or 0.0))
            for run in swept
            if (score := run.scores().get(name)) is not None
        ]
        for name in names
    }
    if len({point.at for points in curves.values() for point in points}) < 2:
        return False
    figure = Figure(
        figsize=(2.9 * min(3, len(curves)) + 0.5, 2.7 * -(-len(curves) // 3) + 0.6), layout="constrained"
    )
    panels = figure.subplots(-(-len(curves) // 3), min(3, len(curves)), squeeze=False)
    for axis in panels.flat[len(curves) :]:
        axis.set_axis_off()
    for axis, (name, points) in zip(panels.flat, curves.items(), strict=False):
        _draw_bars(axis, points)
        axis.set_title(name, fontsize=10)
        _finish(axis, "λ, weight of the clean loss", "score, %")
    figure.suptitle("Scores over loss_ratio")
    save_figure(figure, out)
    return True


def plot_accuracy_over_time(runs: Sequence[Run], out: Path) -> bool:
    """Draw accuracy over training time: evaluations during training as lines, final scores as points.

    A fine-tuned run begins where its pre-training ended; one whose pre-training has no history is labelled.

    Args:
        runs: The runs.
        out: PNG file.

    Returns:
        Whether there was an accuracy to draw.
    """
    panels = _during_training(runs) | _at_the_end(runs)
    panels = dict(list(panels.items())[:_SHOWN])
    if not panels:
        return False
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.8, 2.9 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, curves) in zip(axes.flat, panels.items(), strict=False):
        draw_curves(axis, curves)
        axis.set_title(name, fontsize=10)
        _finish(axis, "training time with pre-training, minutes", "score, %")
        axis.set_xlim(left=0)
    axes.flat[0].legend(frameon=False, fontsize=8)
    figure.suptitle("Accuracy over training time")
    save_figure(figure, out)
    return True


def plot_attack(runs: Sequence[Run], out: Path, *, attack: str) -> bool:
    """Draw accuracy over the budget of an attack, one line a run.

    Args:
        runs: The runs.
        out: PNG file.
        attack: ``"fgsm"`` or ``"pgd"``.

    Returns:
        Whether a run was attacked so.
    """
    curves = {run.name: points for run in runs if (points := run.under_attack(attack))}
    if curves:
        accuracy_over_budget(curves, out, title=f"Accuracy under {attack.upper()}")
    return bool(curves)


def smoothed(
    places: Sequence[float], values: Sequence[float], windows: int = _WINDOWS
) -> tuple[list[float], list[float]]:
    """Means over equal windows, so that a curve of any length has a bounded number of points.

    Args:
        places: On the horizontal axis, shape (n,).
        values: Shape (n,).
        windows: Points to leave at most.

    Returns:
        Means of places and of values; what they were where there are no more than ``windows``.
    """
    parts = min(windows, len(values))
    cut = [np.array_split(np.asarray(numbers, dtype=float), parts) for numbers in (places, values)]
    means = [[float(part.mean()) for part in parts_of] for parts_of in cut]
    return means[0], means[1]


def _score_names(runs: Sequence[Run]) -> list[str]:
    """Names of all scores; those under attack, which have plots of their own, come last."""
    names = dict.fromkeys(name for run in runs for name in run.scores())
    return sorted(names, key=lambda name: "ε=" in name)


def _loss(run: Run, name: str) -> tuple[list[float], list[float]]:
    lines = [line for line in run.batches if name in line]
    return smoothed([line["batch"] for line in lines], [line[name] for line in lines])


def _during_training(runs: Sequence[Run]) -> dict[str, dict[str, list[Point]]]:
    """Accuracies of the evaluations in the histories, in percent, by name and run."""
    panels: dict[str, dict[str, list[Point]]] = {}
    for run in runs:
        for line in run.history:
            for name, value in line.get("eval", {}).items():
                if (scale := _to_percent(name)) is not None:
                    curves = panels.setdefault(name, {_label(run): [] for run in runs})
                    curves[_label(run)].append(Point(_minutes(run, line["seconds"]), scale * value))
    return panels


def _to_percent(name: str) -> float | None:
    """What makes percent of a score that is an accuracy: torchmetrics gives fractions, a probe percent."""
    if name.startswith("probe/"):
        return 1.0
    return 100.0 if re.search(r"accuracy|top\d", name.lower()) else None


def _at_the_end(runs: Sequence[Run]) -> dict[str, dict[str, list[Point]]]:
    """Final scores at the end of training."""
    names = _score_names(runs)
    return {
        name: {
            _label(run): [score._replace(at=_minutes(run, run.seconds))]
            if (score := run.scores().get(name))
            else []
            for run in runs
        }
        for name in names
    }


def _label(run: Run) -> str:
    return run.name if run.seconds_before is not None else f"{run.name} (fine-tuning only)"


def _minutes(run: Run, seconds: float) -> float:
    """Minutes since the start of pre-training, where it is known when that was."""
    return ((run.seconds_before or 0.0) + seconds) / 60


def _draw_bars(axis: Axes, points: Sequence[Point]) -> None:
    """A line with error bars, where intervals are known."""
    points = sorted(points)
    below = [point.value - (point.value if point.low is None else point.low) for point in points]
    above = [(point.value if point.high is None else point.high) - point.value for point in points]
    places, values = [point.at for point in points], [point.value for point in points]
    axis.errorbar(places, values, yerr=[below, above], color=COLOURS[0], marker="o", markersize=4, capsize=3)


def _finish(axis: Axes, across: str, up: str) -> None:
    axis.set_xlabel(across, fontsize=9)
    axis.set_ylabel(up, fontsize=9)
    axis.grid(alpha=0.3, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
