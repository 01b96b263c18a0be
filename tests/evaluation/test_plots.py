"""Plots: what is drawn, and that a plot leaves nothing but its file."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure
from PIL import Image

from aemim_algorithm.evaluation import plots
from aemim_algorithm.evaluation.plots import (
    Point,
    accuracy_over_budget,
    accuracy_over_severity,
    draw_curves,
    save_figure,
)

CURVE = [Point(2.0, 40.0, 35.0, 45.0), Point(0.0, 80.0, 75.0, 85.0), Point(1.0, 60.0)]


def test_curves_are_drawn_in_the_order_of_the_axis_with_bands_where_intervals_are_known() -> None:
    axis = Figure().add_subplot()
    draw_curves(axis, {"ours": CURVE, "none": []})
    line, empty = axis.get_lines()
    assert line.get_xdata().tolist() == [0, 1, 2]
    assert line.get_ydata().tolist() == [80, 60, 40]
    assert len(empty.get_xdata()) == 0
    (band,) = axis.collections
    corners = {tuple(vertex) for vertex in band.get_paths()[0].vertices.tolist()}
    assert corners == {(0.0, 75.0), (0.0, 85.0), (2.0, 35.0), (2.0, 45.0)}
    assert line.get_color() != empty.get_color()


def test_a_plot_is_one_png_and_touches_no_global_state(tmp_path: Path) -> None:
    before = (dict(matplotlib.rcParams), matplotlib.get_backend())
    accuracy_over_budget({"FGSM": CURVE}, tmp_path / "new" / "budget.png", title="a")
    severities = {name: [Point(s, 90 - 9 * s) for s in range(1, 6)] for name in ("fog", "frost", "snow")}
    accuracy_over_severity({"one": severities, "two": severities}, tmp_path / "severity.png", title="b")
    assert (dict(matplotlib.rcParams), matplotlib.get_backend()) == before
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["budget.png", "severity.png"]
    for path in tmp_path.rglob("*.png"):
        with Image.open(path) as image:
            assert image.size > (300, 300)
            assert len(set(image.convert("L").tobytes())) > 20  # not empty


def test_a_plot_that_fails_leaves_the_older_one(tmp_path: Path) -> None:
    out = tmp_path / "plot.png"
    out.write_bytes(b"older")

    class Broken(Figure):
        def savefig(self, path: Path, **options: object) -> None:  # type: ignore[override]
            Path(path).write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_figure(Broken(), out)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"older"]


def test_nothing_to_draw_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no point to draw"):
        accuracy_over_budget({"a": []}, tmp_path / "a.png", title="")
    with pytest.raises(ValueError, match="no point to draw"):
        accuracy_over_severity({"a": {"fog": []}}, tmp_path / "a.png", title="")
    assert not list(tmp_path.iterdir())


def test_titles_are_within_the_figure_and_equal_curves_can_be_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, out: figures.append(figure))
    title = "timm:vit_base_patch16_224.augreg_in1k, " + "corrupted on the fly after resize and crop " * 3
    accuracy_over_severity({"one": {"fog": CURVE}}, tmp_path / "a.png", title=title)
    accuracy_over_severity({"one": dict.fromkeys("abcdef", CURVE)}, tmp_path / "a.png", title=title)
    accuracy_over_budget({"FGSM": CURVE, "PGD-20": CURVE}, tmp_path / "b.png", title=title)
    for figure in figures:
        figure.draw_without_rendering()
        box = (getattr(figure, "_suptitle", None) or figure.axes[0].title).get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    one, two = figures[-1].axes[0].get_lines()
    assert one.get_linestyle() != two.get_linestyle()
