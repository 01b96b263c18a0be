"""Markdown tables of results, laid out as the paper's Tables 4 to 7, with its rows beside ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aemim_algorithm.evaluation.imagenet import SETS
from aemim_algorithm.evaluation.paper import SOURCE, TABLE_4, TABLE_5, TABLE_6, TABLE_7, PaperRow

__all__ = ["markdown", "markdown_table", "score", "table_7"]

_NONE = "–"
_HEAD = (
    "Top-1 in percent, with the 95% Wilson interval; that of mean errors is as if folders were independent. "
    f"The paper's rows are those of {SOURCE}."
)
_TITLES = {name: kind.title for name, kind in SETS.items()} | {"c": "ImageNet-C"}
_TABLE_6_BUDGETS = (0.0, 1.0, 2.0, 4.0, 8.0)


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of one evaluation.

    Args:
        report: As in `results.json`.

    Returns:
        Markdown: first what was measured, then the paper's tables, corruptions, attacks, a detector's average
        precision and timm's numbers, as far as they were evaluated, what was left out or not finished, and
        how long each part took.
    """
    name = report["classifier"]["name"]
    parts = [
        f"# {name}",
        _HEAD,
        _unfinished(report.get("unfinished", ())),
        _skipped(report["skipped"]),
        _measured(_clean(report)),
        *_paper_tables(report, name),
        _corruptions(
            f"Corruptions made on the fly, of {_chosen(report, 'corruptions')}", report.get("corruptions")
        ),
        _corruptions("ImageNet-C, official folders", report.get("imagenet_c")),
        _attacks(report, name),
        _detection(report.get("detection")),
        _published(report.get("published")),
        _timing(report.get("timing")),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def score(a: float, r: float, sketch: float, mce: float) -> float:
    """The paper's score of Table 5: the mean of top-1 on A, R, Sketch, and 100 - mCE; all in percent."""
    return (a + r + sketch + 100 - mce) / 4


def table_7(runs: Mapping[str, Sequence[float | None]]) -> str:
    """The paper's Table 7 with runs below its rows.

    Args:
        runs: AP of boxes and of masks in percent, by the run's name.

    Returns:
        Markdown, with a heading.
    """
    title = "Table 7: average precision on COCO, Mask R-CNN"
    return _paper_table(title, ("AP box", "AP mask"), TABLE_7, runs)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _skipped(skipped: Mapping[str, str]) -> str:
    if not skipped:
        return ""
    reasons = "; ".join(f"{name} ({reason})" for name, reason in skipped.items())
    return f"**Not evaluated:** {reasons}."


def _unfinished(parts: Sequence[str]) -> str:
    return (
        f"**Incomplete:** {', '.join(parts)} had not been evaluated when this was written." if parts else ""
    )


def _clean(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows that are not of an attack; those are of the metric top1 as well."""
    return [row for row in report["results"] if "attack" not in row]


def _chosen(report: Mapping[str, Any], part: str) -> str:
    """The set that was corrupted or attacked, and which one was not though it was given."""
    name = (report.get(part) or {}).get("set", "clean")
    both = name == "imagenet" and any(row["set"] == "clean" for row in report["results"])
    return f"{_TITLES[name]} (not {_TITLES['clean']})" if both else _TITLES[name]


def _measured(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [_TITLES[row["set"]], row["metric"], f"{row['value']:.2f}", _interval(row), _count(row)]
        for row in rows
    ]
    if not cells:
        return ""
    return f"## Measured\n\n{markdown_table(['set', 'metric', '%', '95% interval', 'images'], cells)}"


def _interval(row: Mapping[str, Any]) -> str:
    return _NONE if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"


def _count(row: Mapping[str, Any]) -> str:
    official = row.get("official_n")
    folders = f" in each of {row['folders']} sets" if "folders" in row else ""
    if official in (None, row["n"]):
        return f"{row['n']:,}{folders}"
    few = row["n"] < official
    return (f"{row['n']:,} of {official:,}" if few else f"{row['n']:,}, officially {official:,}") + folders


def _why_apart(row: Mapping[str, Any]) -> str | None:
    """Why a number of a set is not to be compared with the paper's."""
    official = row.get("official_n")
    if official in (None, row["n"]):
        return None
    few = f"{row['n']:,} of {official:,} images"
    return few if row["n"] < official else f"{row['n']:,} images, officially {official:,}"


def _paper_tables(report: Mapping[str, Any], name: str) -> list[str]:
    """Tables 4 and 5, each if one of its sets was evaluated."""
    top1 = {row["set"]: row for row in _clean(report) if row["metric"] == "top1"}
    values = {key: row["value"] for key, row in top1.items()}
    official = report.get("imagenet_c") or {}
    mce = None if official.get("incomplete") else official.get("mCE")
    four = [None, *(values.get(key) for key in ("imagenet", "real", "v2"))]
    three = [values.get(key) for key in ("a", "r", "sketch")]
    known = [value for value in three if value is not None]
    total = score(known[0], known[1], known[2], mce) if mce is not None and len(known) == 3 else None
    apart = {key: reason for key, row in top1.items() if (reason := _why_apart(row))}
    if official.get("incomplete"):
        apart["c"] = official["incomplete"]
    five = ("A", "R", "Sketch", "C (mCE)", "score")
    title_5 = "Table 5: top-1 out of distribution; C is mCE, lower is better"
    return [
        _paper_table(title, heads, paper, {name: numbers})
        + _apart({key: reason for key, reason in apart.items() if key in sets})
        for title, heads, paper, numbers, sets in (
            ("Table 4: top-1", ("RPTT", "IN", "Real", "V2"), TABLE_4, four, ("imagenet", "real", "v2")),
            (title_5, five, TABLE_5, [*three, mce, total], ("a", "r", "sketch", "c")),
        )
        if any(number is not None for number in numbers)
    ]


def _apart(reasons: Mapping[str, str]) -> str:
    named = ", ".join(f"{_TITLES[key]} ({reason})" for key, reason in reasons.items())
    return f"\n\nNot to be compared with the paper: {named}." if reasons else ""


def _paper_table(
    title: str,
    heads: Sequence[str],
    paper: Sequence[PaperRow],
    ours: Mapping[str, Sequence[float | None]],
) -> str:
    rows = [[row.backbone, row.method, str(row.epochs), *map(_number, row.numbers)] for row in paper]
    rows += [
        [_NONE, f"**{name}**", _NONE, *(f"**{_number(number)}**" for number in numbers)]
        for name, numbers in ours.items()
    ]
    return f"## {title}\n\n{markdown_table(['backbone', 'method', 'epochs', *heads], rows)}"


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1f}"


def _corruptions(title: str, result: Mapping[str, Any] | None) -> str:
    if not result:
        return ""
    severities = sorted({key for row in result["accuracy"].values() for key in row}, key=int)
    relative = result.get("corruption_error") or (result.get("relative_to_baseline") or {}).get(
        "per_corruption"
    )
    heads = ["corruption", *(f"severity {key}" for key in severities), "mean error"]
    rows = [
        [corruption, *(f"{cells[key]['value']:.1f}" if key in cells else _NONE for key in severities)]
        + [f"{result['error'][corruption]:.1f}"]
        + ([f"{relative[corruption]:.1f}"] if relative else [])
        for corruption, cells in result["accuracy"].items()
    ]
    heads += ["relative error"] if relative else []
    return f"## {title}\n\n{markdown_table(heads, rows)}\n\n{_summary(result)}"


def _summary(result: Mapping[str, Any]) -> str:
    counts = {cell["n"] for row in result["accuracy"].values() for cell in row.values()}
    lines = [f"{'/'.join(f'{count:,}' for count in sorted(counts))} images each; {result['preprocessing']}."]
    if result["unnormalised_error"] is not None:
        lines.append(f"Mean error, unnormalised (not mCE): {result['unnormalised_error']:.2f}%.")
    if result["mCE"] is not None:
        apart = f" ({result['incomplete']}: not to be compared)" if result.get("incomplete") else ""
        lines.append(f"mCE, relative to AlexNet: {result['mCE']:.2f}%{apart}.")
    else:
        lines.append(f"No mCE: {result['why_no_mCE']}.")
    if result.get("relative_to_baseline"):
        lines.append(f"Mean error relative to the baseline: {result['relative_to_baseline']['mean']:.2f}%.")
    return " ".join(lines)


def _attacks(report: Mapping[str, Any], name: str) -> str:
    attacks = report.get("attacks")
    if not attacks:
        return ""
    attacked = [row for row in report["results"] if "attack" in row]
    fgsm = {row["epsilon"]: row["value"] for row in attacked if row["attack"] == "fgsm"}
    parts = []
    if fgsm and attacks["set"] == "imagenet":
        heads = [f"ε = {budget:g}" for budget in _TABLE_6_BUDGETS]
        numbers = [fgsm.get(budget) for budget in _TABLE_6_BUDGETS]
        parts.append(
            _paper_table("Table 6: top-1 under FGSM, ε in 1/255", heads, TABLE_6, {name: numbers})
            + f"\n\nThe paper's are of ARES-Bench's 5,000 images, ours of {attacks['images']}."
        )
    rows = [
        [
            row["attack"],
            f"{row['epsilon']:g}",
            str(row["steps"]),
            f"{row['value']:.2f}",
            _interval(row),
            _count(row),
        ]
        for row in attacked
    ]
    heads = ["attack", "ε, 1/255", "steps", "%", "95% interval", "images"]
    parts.append(f"## Under attack, on {_chosen(report, 'attacks')}\n\n{markdown_table(heads, rows)}")
    return "\n\n".join(parts)


def _detection(detection: Mapping[str, Any] | None) -> str:
    if not detection:
        return ""
    run = {detection["run"]: [detection[kind]["AP"] for kind in ("box", "mask")]}
    where = f"{detection['images']:,} images of {detection['data']}, {detection['trained']}"
    return f"{table_7(run)}\n\nOurs is on {where}, from the encoder {detection['encoder']}."


def _timing(timing: Mapping[str, Mapping[str, float]] | None) -> str:
    if not timing:
        return ""
    cells = [
        [name, f"{part['images']:,}", f"{part['seconds']:.1f}", f"{part['share_waiting']:.0%}"]
        for name, part in timing.items()
    ]
    return f"## Time\n\n{markdown_table(['part', 'images', 'seconds', 'of it waiting for data'], cells)}"


def _published(rows: Sequence[Mapping[str, Any]] | None) -> str:
    if not rows:
        return ""
    cells = [
        [
            _TITLES[row["set"]],
            row["metric"],
            f"{row['value']:.3f}",
            f"{row['published']:.3f}",
            f"{row['difference']:+.3f}",
            "yes" if row["within_interval"] else "no",
        ]
        for row in rows
    ]
    heads = ["set", "metric", "here, %", "timm, %", "difference", "within our interval"]
    return f"## Against timm's published numbers\n\n{markdown_table(heads, cells)}"
