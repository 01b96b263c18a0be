"""``aemim report``: several runs side by side, as Markdown with plots beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from aemim_algorithm.environment import write_text
from aemim_algorithm.evaluation.detection import precisions
from aemim_algorithm.evaluation.paper import SOURCE
from aemim_algorithm.evaluation.report_plots import (
    plot_accuracy_over_time,
    plot_attack,
    plot_loss_ratio_sweep,
    plot_losses,
)
from aemim_algorithm.evaluation.runs import Run, differing_settings, read_runs
from aemim_algorithm.evaluation.tables import markdown_table, table_7

__all__ = ["report_markdown", "write_report"]

Draw = Callable[[Sequence[Run], Path], bool]

# By the name of its file: title, function, caption.
_PLOTS: dict[str, tuple[str, Draw, str]] = {
    "losses.png": (
        "Losses",
        plot_losses,
        "Means over windows of batches. Both are losses of reconstructing the clean image (Eq. 5), from "
        "itself and from the attacked one; as Figure 2 of the paper.",
    ),
    "loss_ratio.png": (
        "Weight of the clean loss",
        plot_loss_ratio_sweep,
        "Scores over λ, `loss_ratio`, of runs that differ in it; as Figure 4 of the paper. Bars are 95% "
        "intervals over test images; one seed a run.",
    ),
    "accuracy_over_time.png": (
        "Accuracy over training time",
        plot_accuracy_over_time,
        "Time is that of training, on each run's own hardware: evaluation does not count, checkpoints do. A "
        "fine-tuned run begins where the history beside its encoder ends; where there is none, its line is "
        "labelled, and is of fine-tuning only.",
    ),
    "fgsm.png": (
        "Accuracy under FGSM",
        partial(plot_attack, attack="fgsm"),
        "One step, no random start; an image that is wrong without the attack counts as wrong; as Table 6.",
    ),
    "pgd.png": (
        "Accuracy under PGD",
        partial(plot_attack, attack="pgd"),
        "An image that is wrong without the attack counts as wrong; as Figure 3 of the paper.",
    ),
}


def write_report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Put runs side by side.

    Args:
        folders: Save folders of runs, each with ``recipe.yaml`` and ``history.jsonl``; scores are those of
            ``results.json`` and ``probe.json`` beside them.
        out: Folder to write to: ``report.md`` and the plots for which there is something to draw. An older
            report's plots that this one does not have are removed.

    Returns:
        What was written.

    Raises:
        ValueError: If a run cannot be read; nothing is written then.
        OSError: If something cannot be written.
    """
    runs = read_runs(folders)
    drawn = [name for name, (_, draw, _) in _PLOTS.items() if draw(runs, out / name)]
    write_text(report_markdown(runs, plots=drawn), out / "report.md")
    for name in _PLOTS.keys() - set(drawn):
        (out / name).unlink(missing_ok=True)
    return [out / "report.md", *(out / name for name in drawn)]


def report_markdown(runs: Sequence[Run], *, plots: Sequence[str] = ()) -> str:
    """The report's text.

    Args:
        runs: The runs.
        plots: Names of the plots that lie beside it.

    Returns:
        Markdown.
    """
    sections = [
        "# " + ", ".join(run.name for run in runs),
        "## Runs\n\n" + _run_table(runs),
        "## Settings that differ\n\n" + _settings_table(runs),
        "## Scores\n\n" + _score_table(runs),
        *_detection_table(runs),
    ]
    for name in plots:
        title, _, caption = _PLOTS[name]
        sections.append(f"## {title}\n\n![{title}]({name})\n\n{caption}")
    return "\n\n".join(sections) + "\n"


def _run_table(runs: Sequence[Run]) -> str:
    rows = [[run.name, *_progress(run)] for run in runs]
    header = [
        "run",
        "in epoch",
        "batches",
        "training time, min",
        "last loss, clean",
        "last loss, adversarial",
    ]
    return markdown_table(header, rows)


def _progress(run: Run) -> list[str]:
    if not run.batches:
        return ["0", "0", "0", "", ""]
    last = run.batches[-1]
    clean = last.get("loss/train/clean", last.get("loss/train/total"))
    adversarial = last.get("loss/train/adversarial")
    losses = ["" if loss is None else f"{loss:.4g}" for loss in (clean, adversarial)]
    return [str(last["epoch"] + 1), str(last["batch"]), f"{run.seconds / 60:.1f}", *losses]


def _settings_table(runs: Sequence[Run]) -> str:
    differing = differing_settings(runs)
    if not differing:
        return "None: the recipes are equal."
    rows = [[f"`{key}`", *map(_value, values)] for key, values in differing.items()]
    return markdown_table(["setting", *(run.name for run in runs)], rows)


def _score_table(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.scores()))
    if not names:
        return "None yet: `aemim evaluate`, `aemim probe` and `aemim detect` leave them in the run's folder."
    rows = [[name, *(_score(run, name) for run in runs)] for name in names]
    return (
        markdown_table(["score", *(run.name for run in runs)], rows)
        + "\n\nIn brackets: 95% intervals over test images."
    )


def _detection_table(runs: Sequence[Run]) -> list[str]:
    """Table 7 with the runs that are of detectors, if there are any."""
    found = {run.name: precisions(run.results) for run in runs}
    detectors = {name: numbers for name, numbers in found.items() if numbers is not None}
    if not detectors:
        return []
    return [f"{table_7(detectors)}\n\nThe paper's rows are those of {SOURCE}."]


def _score(run: Run, name: str) -> str:
    point = run.scores().get(name)
    if point is None:
        return ""
    if point.low is None or point.high is None:
        return f"{point.value:.2f}"
    return f"{point.value:.2f} ({point.low:.2f} to {point.high:.2f})"


def _value(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "\\|")
