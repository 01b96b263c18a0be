"""Plots of accuracies as PNG files: over an attack's budget (paper, Figure 3), over a corruption's severity.

Figures are made without pyplot, so no global state is touched and nothing has to be closed.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["COLOURS", "Point", "accuracy_over_budget", "accuracy_over_severity", "draw_curves", "save_figure"]

COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"),
    *("#8c6d31", "#882255", "#7f7f7f"),
)
"""Of Okabe and Ito, which the colour-blind can tell apart, and three more."""

_MARKERS = "osD^vPX*"
_TITLE_SIZE = 10  # points, 1/72 of an inch
_LINES = ("-", "--", ":", "-.")
_PANELS = 5  # in a row


class Point(NamedTuple):
    """An accuracy in percent, with its 95% interval, at a place on the horizontal axis."""

    at: float
    value: float
    low: float | None = None
    high: float | None = None


def accuracy_over_budget(curves: Mapping[str, Sequence[Point]], out: str | Path, *, title: str) -> None:
    """Draw accuracy over the L-infinity budget, one line a curve.

    Args:
        curves: Points by a curve's name; ``at`` is the budget in 1/255 of the pixel range, values in percent.
        out: PNG file to write, whole or not at all; its folder is made.
        title: Title of the figure.

    Raises:
        ValueError: If there is no point.
    """
    _require_points(curves.values())
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.add_subplot()
    draw_curves(axis, curves)
    axis.set_xlabel("budget ε, L∞, in 1/255 of the pixel range")
    axis.set_ylabel("top-1 accuracy, %")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.set_title(_wrapped(title, width=5.8), fontsize=_TITLE_SIZE)
    above = axis.secondary_xaxis("top", functions=(_as_share, _as_steps))
    above.set_xlabel("as a share of the pixel range", fontsize=8)
    above.tick_params(labelsize=7)
    axis.legend(frameon=False)
    save_figure(figure, out)


def accuracy_over_severity(
    runs: Mapping[str, Mapping[str, Sequence[Point]]], out: str | Path, *, title: str
) -> None:
    """Draw accuracy over severity, one panel a corruption and one line a classifier.

    Args:
        runs: By a classifier's name, by a corruption's name: points whose ``at`` is the severity 1 to 5,
            values in percent.
        out: PNG file to write, whole or not at all; its folder is made.
        title: Title of the figure.

    Raises:
        ValueError: If there is no point.
    """
    _require_points(curve for curves in runs.values() for curve in curves.values())
    names = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    columns = min(_PANELS, len(names))
    rows = -(-len(names) // columns)
    width = max(4.0, 2.3 * columns + 0.6)
    title = _wrapped(title, width=width)
    figure = Figure(figsize=(width, 2.0 * rows + 0.8 + 0.2 * len(title.split("\n"))), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        draw_curves(axis, {run: curves.get(name, ()) for run, curves in runs.items()})
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.set_xticks(range(1, 6))
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    axes.flat[0].set_ylim(bottom=0)
    figure.supxlabel("severity", fontsize=10)
    figure.supylabel("top-1 accuracy, %", fontsize=10)
    figure.suptitle(title, fontsize=_TITLE_SIZE)
    if len(runs) > 1:
        axes.flat[0].legend(loc="lower left", fontsize=7, frameon=False)
    save_figure(figure, out)


def draw_curves(axis: Axes, curves: Mapping[str, Sequence[Point]]) -> None:
    """Draw lines with markers, and their intervals as bands, into an axis; a name keeps its colour.

    Args:
        axis: Where to draw.
        curves: Points by name, in any order of ``at``; one without points is only named.
    """
    for number, (name, points) in enumerate(curves.items()):
        points = sorted(points)
        colour, marker = COLOURS[number % len(COLOURS)], _MARKERS[number % len(_MARKERS)]
        places = [point.at for point in points]
        axis.plot(
            places,
            [point.value for point in points],
            color=colour,
            marker=marker,
            # Where curves are equal, the last one is thin, dashed and hollow: the others show through.
            markersize=4 + 1.5 * (number % 4),
            markerfacecolor=colour if number == 0 else "none",
            linestyle=_LINES[number % len(_LINES)],
            linewidth=1.5,
            label=name,
        )
        known = [(p.at, p.low, p.high) for p in points if p.low is not None and p.high is not None]
        if len(known) == 1:  # a band has no width there
            (place, low, high) = known[0]
            axis.vlines(place, low, high, color=colour, linewidth=1)
        elif known:
            ends = [list(column) for column in zip(*known, strict=True)]
            axis.fill_between(ends[0], ends[1], ends[2], color=colour, alpha=0.15, linewidth=0)
    axis.grid(alpha=0.3, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def save_figure(figure: Figure, out: str | Path) -> None:
    """Write a figure as PNG, whole or not at all; its folder is made.

    Args:
        figure: The figure.
        out: The file.

    Raises:
        OSError: If it cannot be written; an older file is left as it was.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, dpi=150, format="png")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _wrapped(title: str, *, width: float) -> str:
    """A title in lines that fit into a width in inches: a letter is some 0.6 of its height wide."""
    letters = int(width * 72 / (0.6 * _TITLE_SIZE))
    return "\n".join(part for line in title.split("\n") for part in textwrap.wrap(line, letters))


def _as_share(budget: Any) -> Any:
    return budget / 255


def _as_steps(share: Any) -> Any:
    return share * 255


def _require_points(curves: Iterable[Sequence[Point]]) -> None:
    if not any(len(curve) for curve in curves):
        raise ValueError("got no point to draw; expected one at least")
