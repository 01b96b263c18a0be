"""The Markdown tables of what AEMIM costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from breakdown import PARTS
from enduring import FAILED
from flops import NAIVE
from training import BARE, PLAIN
from turns import ratios, spread

__all__ = ["tables"]

Row = Mapping[str, Any]

_HEAD = (
    *("model", "precision", "micro-batch", "method", "step, s", "× plain", "FLOPs × plain", "bound"),
    *("images/s", "peak memory, GiB", "× plain", "above the built model, GiB", "× plain"),
)


def tables(result: Mapping[str, Any]) -> str:
    """All tables of a result of `cost.py`."""
    parts = [_costs(result["measured"], result["flops_per_image"])]
    if any(row["method"] in BARE for row in result["measured"]):
        parts.append(_against_bare(result["measured"]))
    if result["breakdown"]:
        parts.append(_breakdowns(result["breakdown"]))
    if result["overhead"]:
        parts.append(_overheads(result["overhead"]))
    return "\n\n".join(parts)


def _costs(rows: Sequence[Row], flops: Mapping[str, Any]) -> str:
    lines = [_line(_HEAD), _line(["---"] * len(_HEAD))]
    for row in rows:
        place = [row["model"], row["precision"], str(row["micro_batch"]), row["method"]]
        lines.append(_line([*place, *_cells(row, _base(row, rows, PLAIN), flops.get(row["model"]))]))
    notes = [
        f"{model}: with an extra clean encoder pass AEMIM needs {_times(counts['bound'], NAIVE)} × plain."
        for model, counts in flops.items()
    ]
    return "\n".join(
        [
            *lines,
            "\nMedian (min–max). Peak memory is of the whole process, or CUDA's allocated maximum; the other "
            "column is without what importing and building the model and the optimizer left.",
            *notes,
        ]
    )


def _cells(row: Row, base: Row | None, flops: Mapping[str, Any] | None) -> list[str]:
    counts = ["–", "–"]
    if flops is not None and row["method"] in flops["counted"]:
        counts = [_times(flops[kind], row["method"]) for kind in ("counted", "bound")]
    if FAILED in row:
        return [row[FAILED], "–", *counts, *["–"] * 5]
    peak, above = row["peak_memory_bytes"], _above(row)
    compared = ["–"] * 3
    if base is not None:
        compared = [
            spread(ratios(row["seconds"], base["seconds"])),
            f"{peak / base['peak_memory_bytes']:.2f}",
            f"{above / _above(base):.2f}",
        ]
    return [
        spread(row["seconds"], 3),
        compared[0] + (" (alone)" if row["alone"] else ""),
        *counts,
        f"{row['micro_batch'] / statistics.median(row['seconds']):.1f}",
        f"{peak / 2**30:.2f}",
        compared[1],
        f"{above / 2**30:.2f}",
        compared[2],
    ]


def _against_bare(rows: Sequence[Row]) -> str:
    """Ratios of a method to its passes by hand, within rounds."""
    lines = ["| model | precision | micro-batch | method | × its passes by hand |", "|---|---|---|---|---|"]
    for bare, method in BARE.items():
        for row in rows:
            base = _base(row, rows, bare) if row["method"] == method else None
            if base is not None and FAILED not in row:
                ratio = spread(ratios(row["seconds"], base["seconds"]), 3)
                lines.append(_line([row["model"], row["precision"], str(row["micro_batch"]), method, ratio]))
    return "\n".join(lines)


def _breakdowns(measured: Sequence[Row]) -> str:
    head = ["model", "precision", "micro-batch", "method", "step, s", *PARTS]
    lines = [_line(head), _line(["---"] * len(head))]
    for one in measured:
        for method, seconds in one["seconds"].items():
            parts = [f"{seconds[part]:.3f} ({seconds[part] / seconds['step']:.0%})" for part in PARTS]
            place = [one["model"], one["precision"], str(one["micro_batch"]), method]
            lines.append(_line([*place, f"{seconds['step']:.3f}", *parts]))
    return "\n".join([*lines, "\nSeconds under the profiler, and their share of the step."])


def _overheads(rows: Sequence[Row]) -> str:
    lines = [
        "| model | precision | micro-batch | method | beyond its passes, ms | of a step |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        milliseconds = spread([1000 * value for value in row["seconds"]], 1)
        place = [row["model"], row["precision"], str(row["micro_batch"]), row["method"]]
        lines.append(_line([*place, milliseconds, f"{row['share']:.2%}"]))
    return "\n".join([*lines, "\nMeasured on a narrow model with the same layers and images."])


def _base(row: Row, rows: Sequence[Row], method: str) -> Row | None:
    """The row of another method on the same combination, if it could be measured."""
    same = ("model", "precision", "micro_batch")
    return next(
        (
            other
            for other in rows
            if other["method"] == method and FAILED not in other and all(other[k] == row[k] for k in same)
        ),
        None,
    )


def _above(row: Row) -> int:
    return int(row["peak_memory_bytes"] - row["built_memory_bytes"])


def _times(flops: Mapping[str, float], method: str) -> str:
    return f"{flops[method] / flops[PLAIN]:.3f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
