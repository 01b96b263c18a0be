"""The report of runs: what it says of known histories, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image

from aemim_algorithm.cli import main
from aemim_algorithm.evaluation import report_plots
from aemim_algorithm.evaluation.report import write_report
from aemim_algorithm.evaluation.report_plots import smoothed
from aemim_algorithm.evaluation.runs import Run, differing_settings, read_run, read_runs

Plot: TypeAlias = Callable[[Sequence[Run], Path], bool]


def run_in(
    folder: Path,
    *,
    loss_ratio: float | None = 0.5,
    value: float | None = None,
    batches: int = 500,
    evaluated: bool = False,
) -> Path:
    """A run with a known course."""
    folder.mkdir(parents=True)
    recipe: dict[str, Any] = {"run_name": folder.name, "seed": 17, "optimizer": {"betas": [0.9, 0.95]}}
    if loss_ratio is not None:
        recipe["algorithms"] = {"aemim": {"loss_ratio": loss_ratio}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lines: list[dict[str, Any]] = []
    for batch in range(1, batches + 1):
        clean, adversarial = 1 / math.sqrt(batch), 1.5 / math.sqrt(batch)
        line = {"batch": batch, "epoch": (batch - 1) // 100, "seconds": batch * 0.6, "learning_rate": 1e-3}
        line["loss/train/total"] = clean if loss_ratio is None else (clean + adversarial) / 2
        if loss_ratio is not None:
            line |= {"loss/train/clean": clean, "loss/train/adversarial": adversarial}
        lines.append(line)
        if evaluated and batch % 100 == 0:
            score = {"eval/top1": 0.9 - 0.5 / (batch // 100)}
            lines.append({"batch": batch, "epoch": batch // 100, "seconds": batch * 0.6, "eval": score})
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if value is not None:
        row = {
            "set": "probe",
            "metric": "knn",
            "value": value,
            "n": 1000,
            "low": value - 3,
            "high": value + 3,
        }
        (folder / "probe.json").write_text(json.dumps({"results": [row]}))
    return folder


def test_a_report_says_what_the_runs_are(tmp_path: Path) -> None:
    folders = [
        run_in(tmp_path / "half", loss_ratio=0.5, value=42.5),
        run_in(tmp_path / "most", loss_ratio=0.75, value=40.25, batches=250),
        run_in(tmp_path / "plain", loss_ratio=None),
    ]
    written = write_report(folders, tmp_path / "out")
    assert [path.name for path in written] == [
        "report.md",
        "losses.png",
        "loss_ratio.png",
        "accuracy_over_time.png",
    ]
    text = written[0].read_text()
    assert "| half | 5 | 500 | 5.0 | 0.04472 | 0.06708 |" in text
    assert "| most | 3 | 250 | 2.5 | 0.06325 | 0.09487 |" in text
    assert "| plain | 5 | 500 | 5.0 | 0.04472 |  |" in text  # without a branch, its loss is the clean one
    assert "| `algorithms.aemim.loss_ratio` | 0.5 | 0.75 |  |" in text
    assert "| probe knn | 42.50 (39.50 to 45.50) | 40.25 (37.25 to 43.25) |  |" in text
    assert "run_name" not in text
    assert "seed" not in text.split("## Scores")[0].split("## Settings")[1]
    for path in written[1:]:
        assert f"]({path.name})" in text
        with Image.open(path) as image:
            assert image.width > 500
    assert not list((tmp_path / "out").glob(".*"))


def test_only_what_can_be_drawn_is_drawn_and_older_plots_go(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_report([run_in(tmp_path / "a", value=1.0), run_in(tmp_path / "b", loss_ratio=0.9, value=2.0)], out)
    written = write_report([run_in(tmp_path / "c"), run_in(tmp_path / "d")], out)
    assert sorted(out.iterdir()) == sorted(written)
    assert [path.name for path in written] == ["report.md", "losses.png"]
    text = written[0].read_text()
    assert "None: the recipes are equal." in text
    assert "None yet: `aemim evaluate`, `aemim probe`" in text


def drawn(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, plot: Plot = report_plots.plot_accuracy_over_time
) -> dict[str, dict[str, list[list[float]]]]:
    """Points of a plot, by default accuracy over time, by panel and line, as they stand in the figure."""
    figures: list[Figure] = []
    with monkeypatch.context() as patch:
        patch.setattr(report_plots, "save_figure", lambda figure, out: figures.append(figure))
        assert plot(read_runs(folders), Path("x.png"))
    return {
        axis.get_title(): {str(line.get_label()): line.get_xydata().round(6).tolist() for line in axis.lines}
        for axis in figures[0].axes
    }


def test_the_losses_of_both_branches_are_drawn_and_the_one_of_other_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fine-tuning or a detector loses is no loss of the clean branch."""
    folders = [run_in(tmp_path / "aemim", batches=4), run_in(tmp_path / "plain", loss_ratio=None, batches=4)]
    (losses,) = drawn(folders, monkeypatch, report_plots.plot_losses).values()
    clean = [[batch, round(1 / math.sqrt(batch), 6)] for batch in (1, 2, 3, 4)]
    adversarial = [[batch, round(1.5 / math.sqrt(batch), 6)] for batch in (1, 2, 3, 4)]
    assert losses == {"aemim, clean": clean, "aemim, adversarial": adversarial, "plain": clean}


def test_evaluations_during_training_are_drawn_over_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In percent, over minutes."""
    points = drawn([run_in(tmp_path / "a", evaluated=True, value=42.0)], monkeypatch)
    assert points == {
        "eval/top1": {"a": [[1, 40], [2, 65], [3, pytest.approx(73.333333)], [4, 77.5], [5, 80]]},
        "probe knn": {"a": [[5, 42]]},
    }
    (run,) = read_runs([tmp_path / "a"])
    assert (len(run.batches), run.seconds) == (500, 300)


def test_fine_tuning_counts_from_the_start_of_pre_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an encoder has cost before is part of the time; where nothing tells it, the line says so."""
    before = run_in(tmp_path / "pre", batches=250)
    (before / "encoder.pt").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "encoder.pt").touch()
    folders = []
    for name, encoder in {
        "tuned": str(before / "encoder.pt"),
        "bare": str(tmp_path / "elsewhere" / "encoder.pt"),
        "scratch": "random",
    }.items():
        folders.append(run_in(tmp_path / name, loss_ratio=None, evaluated=True, batches=100))
        recipe = {"run_name": name, "model": {"encoder": encoder}}
        (folders[-1] / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    points = drawn(folders, monkeypatch)["eval/top1"]
    assert points == {
        "tuned": [[3.5, 40]],
        "bare (fine-tuning only)": [[1, 40]],
        "scratch": [[1, 40]],
    }


def test_a_run_from_scratch_has_no_pre_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a recipe that happens to lie where the report is made."""
    monkeypatch.chdir(run_in(tmp_path / "here", loss_ratio=0.9))
    folder = run_in(tmp_path / "scratch", loss_ratio=None)
    for encoder in ("random", "gone.pt"):
        (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": {"encoder": encoder}}))
        assert read_run(folder, name="it").loss_ratio is None


def test_a_report_that_fails_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    before = write_report([run_in(tmp_path / "a", value=1.0)], out)

    def fail(figure: Figure, path: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(report_plots, "save_figure", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report([tmp_path / "a"], out)
    assert sorted(out.iterdir()) == sorted(before)


def test_windows_are_means_and_bounded() -> None:
    places, values = smoothed(range(1, 1001), [2.0 * x for x in range(1, 1001)], windows=10)
    assert places == [50.5 + 100 * window for window in range(10)]
    assert values == [2 * place for place in places]
    assert smoothed([1, 2], [3.0, 4.0], windows=10) == ([1, 2], [3, 4])


def test_settings_are_compared_flat_and_without_the_place(tmp_path: Path) -> None:
    one, other = (
        run_in(tmp_path / "x" / "run", loss_ratio=0.5),
        run_in(tmp_path / "y" / "run", loss_ratio=None),
    )
    runs = read_runs([one, other])
    assert [run.name for run in runs] == [str(one), str(other)]  # two of one name
    assert differing_settings(runs) == {"algorithms.aemim.loss_ratio": [0.5, None]}
    assert [run.loss_ratio for run in runs] == [0.5, None]


def test_rows_at_several_budgets_are_several_scores_and_a_plot(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run")
    rows = [
        {"set": "clean", "metric": "top1", "value": 70.0},
        *(
            {"set": "clean", "metric": "top1", "value": 70.0 - e, "attack": "fgsm", "epsilon": e, "steps": 1}
            for e in (1.0, 2.0)
        ),
        {"set": "clean", "metric": "top1", "value": 9.0, "attack": "pgd", "epsilon": 0.51, "steps": 20},
    ]
    (folder / "results.json").write_text(json.dumps({"results": rows}))
    run = read_run(folder, name="run")
    assert {name: point.value for name, point in run.scores().items()} == {
        "clean top1": 70.0,
        "clean top1, FGSM ε=1": 69.0,
        "clean top1, FGSM ε=2": 68.0,
        "clean top1, PGD-20 ε=0.51": 9.0,
    }
    assert [(point.at, point.value) for point in run.under_attack("fgsm")] == [(1, 69), (2, 68)]
    written = [path.name for path in write_report([folder], tmp_path / "out")]
    assert "fgsm.png" in written
    assert "pgd.png" in written


def test_a_fine_tuned_run_has_the_settings_of_its_pre_training(tmp_path: Path) -> None:
    """The sweep of λ is over fine-tuned scores, and λ is a setting of the pre-training."""
    folders = []
    for loss_ratio in (0.25, 0.75):
        before = run_in(tmp_path / f"pre{loss_ratio}", loss_ratio=loss_ratio)
        (before / "encoder.pt").touch()
        after = run_in(tmp_path / f"tuned{loss_ratio}", loss_ratio=None, value=50 + loss_ratio)
        recipe = {"run_name": after.name, "model": {"encoder": str(before / "encoder.pt")}}
        (after / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        folders.append(after)
    runs = read_runs(folders)
    assert [run.loss_ratio for run in runs] == [0.25, 0.75]
    differing = differing_settings(runs)
    assert differing["pretraining.algorithms.aemim.loss_ratio"] == [0.25, 0.75]
    assert "pretraining.run_name" not in differing
    assert "loss_ratio.png" in [path.name for path in write_report(folders, tmp_path / "out")]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("recipe.yaml", "no recipe.yaml; expected the save folder of a run"),
        ("history.jsonl", "no history.jsonl: the run has not trained"),
    ],
)
def test_what_is_no_run_is_one_line(
    broken: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = run_in(tmp_path / "run")
    (folder / broken).unlink()
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["aemim", "report", str(folder), "--out", str(out)])
    with pytest.raises(SystemExit, match="1"):
        main()
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_damaged_results_and_a_run_named_twice_are_refused(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run")
    with pytest.raises(ValueError, match="expected different folders of runs"):
        read_runs([folder, folder / "."])
    (folder / "results.json").write_text('{"results": [{"set": "clean"}]}')
    with pytest.raises(ValueError, match=r"results.json: no results of `aemim evaluate`"):
        read_run(folder, name="run")
