"""The plots of one evaluation: accuracy over an attack's budget, and over a corruption's severity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aemim_algorithm.evaluation.plots import Point, accuracy_over_budget, accuracy_over_severity

__all__ = ["NAMES", "draw"]

SECTIONS = ("corruptions", "imagenet_c")
NAMES = ("attacks.png", *(f"{section}.png" for section in SECTIONS))


def draw(report: Mapping[str, Any], out: Path) -> list[Path]:
    """Draw what was evaluated, and remove the plots of an earlier evaluation that this one did not make.

    Args:
        report: As in `results.json`.
        out: Folder of the PNG files, `attacks.png`, `corruptions.png` and `imagenet_c.png`.

    Returns:
        The files that were written.
    """
    name = report["classifier"]["name"]
    written = []
    if curves := _budgets(report):
        attacks = report["attacks"]
        title = f"{name} under attack\n{attacks['set']}, {attacks['images']}"
        accuracy_over_budget(curves, out / "attacks.png", title=title)
        written.append(out / "attacks.png")
    for section in SECTIONS:
        if section in report:
            title = f"{name}\n{report[section]['preprocessing']}"
            accuracy_over_severity({name: _severities(report[section])}, out / f"{section}.png", title=title)
            written.append(out / f"{section}.png")
    for name in NAMES:
        if out / name not in written:
            (out / name).unlink(missing_ok=True)
    return written


def _budgets(report: Mapping[str, Any]) -> dict[str, list[Point]]:
    curves: dict[str, list[Point]] = {}
    for row in report["results"]:
        if "attack" in row:
            steps = f"-{row['steps']}" if row["attack"] == "pgd" else ""
            point = Point(row["epsilon"], row["value"], row["low"], row["high"])
            curves.setdefault(f"{row['attack'].upper()}{steps}", []).append(point)
    return {name: sorted(points) for name, points in curves.items()}


def _severities(section: Mapping[str, Any]) -> dict[str, list[Point]]:
    return {
        corruption: [
            Point(float(severity), cell["value"], cell["low"], cell["high"])
            for severity, cell in sorted(cells.items(), key=lambda item: int(item[0]))
        ]
        for corruption, cells in section["accuracy"].items()
    }
