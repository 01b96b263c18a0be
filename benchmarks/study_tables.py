"""Tables of a study: what each method reached, in how many seconds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Group", "group_name", "groups", "mean_and_deviation", "score_names", "seconds_until", "table"]

Result = Mapping[str, Any]
Group = Sequence[Mapping[str, Any]]
"""The runs of one method and length: one for each seed."""


def groups(result: Result) -> dict[str, Group]:
    """Runs by method and length, in the order in which they were made."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in result["runs"]:
        found.setdefault(group_name(result, run), []).append(run)
    return {name: found[name] for name in found}


def group_name(result: Result, run: Mapping[str, Any]) -> str:
    """The method; of a run of another length with its epochs."""
    method = run["method"]
    per_epoch = result["batches_per_epoch"][method]
    if run["batches"] == round(result["epochs"] * per_epoch):
        return str(method)
    return f"{method}, {run['batches'] / per_epoch:.1f} epochs"


def table(result: Result) -> str:
    """Markdown: a row for each method and length, means and standard deviations over the seeds."""
    rows, base = groups(result), _base(result)
    names = score_names(result)
    probes = {"k-NN": "knn", "linear": "linear"}
    heads = ["pre-training", "epochs", "seeds", "seconds", "× baseline", *probes, *names]
    heads += [f"seconds until the baseline's {probe}" for probe in probes]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, runs in rows.items():
        first = runs[0]
        cells = [
            name,
            f"{first['batches'] / result['batches_per_epoch'][first['method']]:.1f}",
            str(len(runs)),
            f"{first['seconds']:.0f}",
            f"{first['seconds'] / base[0]['seconds']:.2f}",
            *(
                _cell([run["probes"][-1][probe] for run in runs if run["probes"]])
                for probe in probes.values()
            ),
            *(_cell([run["scores"][score] for run in runs if score in run["scores"]]) for score in names),
            *(_until(runs, base, probe) for probe in probes.values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Mean ± sample standard deviation over seeds; accuracies in percent."])


def score_names(result: Result) -> list[str]:
    """The scores of all runs, in the order of the evaluation."""
    return list(dict.fromkeys(name for run in result["runs"] for name in run["scores"]))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, which one value has not."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def seconds_until(run: Mapping[str, Any], probe: str, target: float) -> float | None:
    """When the probes of a run first reach an accuracy; between two of them, along a line.

    Args:
        run: Of the result, with ``seconds``, ``batches`` and ``probes``.
        probe: ``"knn"`` or ``"linear"``.
        target: In percent.

    Returns:
        Seconds of pre-training; ``None`` if it is not reached.
    """
    a_batch = run["seconds"] / run["batches"]
    before: tuple[float, float] | None = None
    for point in run["probes"]:
        seconds, value = a_batch * point["batch"], point[probe]
        if value >= target:
            if before is None or value == before[1]:
                return float(seconds)
            share = (target - before[1]) / (value - before[1])
            return float(before[0] + share * (seconds - before[0]))
        before = seconds, value
    return None


def _base(result: Result) -> Group:
    """The baseline's runs of the study's epochs."""
    return groups(result)[str(result["baseline"])]


def _until(runs: Group, base: Group, probe: str) -> str:
    """Each seed against the baseline's same seed."""
    targets = {run["seed"]: run["probes"][-1][probe] for run in base if run["probes"]}
    pairs = [(run, targets[run["seed"]]) for run in runs if run["seed"] in targets]
    found = [seconds_until(run, probe, target) for run, target in pairs]
    reached = [seconds for seconds in found if seconds is not None]
    if not reached:
        return "not reached" if found else "–"
    text = _cell(reached, digits=0)
    return text if len(reached) == len(found) else f"{text} ({len(reached)} of {len(found)} seeds)"


def _cell(values: Sequence[float], digits: int = 1) -> str:
    if not values:
        return "–"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")
