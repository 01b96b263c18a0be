"""Tables of a study: what each method reached, in how many seconds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = [
    "Group",
    "Reached",
    "cell",
    "groups",
    "mean_and_deviation",
    "score_names",
    "seconds_until",
    "table",
]

_NOTES = """Mean ± sample standard deviation over seeds; accuracies in percent. Seconds: batches times those
of a batch in turns; measured: as they passed; ≤: the first probe was above it already."""

Result = Mapping[str, Any]
Group = Sequence[Mapping[str, Any]]
"""The runs of one method and length: one for each seed."""


def groups(result: Result) -> dict[str, Group]:
    """Runs of one method and length, by what they are called, in the order in which they were made."""
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for run in result["runs"]:
        found.setdefault((run["method"], run["batches"]), []).append(run)
    named: dict[str, Group] = {}
    for (method, batches), runs in found.items():
        per_epoch = result["batches_per_epoch"][method]
        name = method
        if batches != round(result["epochs"] * per_epoch):
            name = f"{method}, {batches / per_epoch:.1f} epochs"
        named[name if name not in named else f"{name} ({batches} batches)"] = runs
    return named


def table(result: Result) -> str:
    """Markdown: a row for each method and length, means and standard deviations over the seeds."""
    rows, base = groups(result), _base(result)
    names = score_names(result)
    probes = {"k-NN": "knn", "linear": "linear"}
    heads = ["pre-training", "epochs", "seeds", "seconds", "× baseline", "measured", *probes, *names]
    heads += [f"seconds until the baseline's {probe}" for probe in probes]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, runs in rows.items():
        first = runs[0]
        cells = [
            name,
            f"{first['batches'] / result['batches_per_epoch'][first['method']]:.1f}",
            str(len(runs)),
            f"{first['seconds']:.0f}",
            f"{first['seconds'] / base[0]['seconds']:.2f}" if base else "–",
            cell([run["measured_seconds"] for run in runs], digits=0),
            *(cell([run["probes"][-1][probe] for run in runs if run["probes"]]) for probe in probes.values()),
            *(cell([run["scores"][score] for run in runs if score in run["scores"]]) for score in names),
            *(_until(runs, base, probe) for probe in probes.values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _NOTES])


def score_names(result: Result) -> list[str]:
    """The scores of all runs, in the order of the evaluation."""
    return list(dict.fromkeys(name for run in result["runs"] for name in run["scores"]))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, which one value has not."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


class Reached(NamedTuple):
    """When an accuracy was reached.

    Attributes:
        seconds: Of pre-training.
        at_first: The first probe was above it already, so it may have been reached at any time before.
    """

    seconds: float
    at_first: bool


def seconds_until(run: Mapping[str, Any], probe: str, target: float) -> Reached | None:
    """When the probes of a run reach an accuracy for good; between two of them, along a line.

    For good, because probes go up and down: a run would often meet its own final accuracy half way by luck.

    Args:
        run: Of the result, with ``seconds``, ``batches`` and ``probes``.
        probe: ``"knn"`` or ``"linear"``.
        target: In percent.

    Returns:
        When; ``None`` if it does not end there.
    """
    a_batch = run["seconds"] / run["batches"]
    after: tuple[float, float] | None = None
    for point in reversed(run["probes"]):
        seconds, value = a_batch * point["batch"], point[probe]
        if value < target:
            if after is None:
                return None
            share = (target - value) / (after[1] - value)
            return Reached(seconds + share * (after[0] - seconds), at_first=False)
        after = seconds, value
    return None if after is None else Reached(after[0], at_first=True)


def _base(result: Result) -> Group:
    """The baseline's runs of the study's epochs, if there are any."""
    return groups(result).get(str(result["baseline"]), ())


def _until(runs: Group, base: Group, probe: str) -> str:
    """Each seed against the baseline's same seed."""
    targets = {run["seed"]: run["probes"][-1][probe] for run in base if run["probes"]}
    pairs = [(run, targets[run["seed"]]) for run in runs if run["seed"] in targets]
    found = [seconds_until(run, probe, target) for run, target in pairs]
    reached = [when for when in found if when is not None]
    if not reached:
        return "not reached" if found else "–"
    text = "≤ " * any(when.at_first for when in reached) + cell([when.seconds for when in reached], digits=0)
    return text if len(reached) == len(found) else f"{text} ({len(reached)} of {len(found)} seeds)"


def cell(values: Sequence[float], digits: int = 1) -> str:
    """Mean and sample standard deviation, as the tables show them."""
    if not values:
        return "–"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")
