"""What `aemim detect` leaves of a run's average precision, beside the paper's Table 7."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aemim_algorithm.evaluation.paper import SOURCE, TABLE_7
from aemim_algorithm.evaluation.tables import markdown_table, table_7

__all__ = ["detection_markdown", "detection_rows", "paper_rows", "precisions", "read_detection"]

_KINDS = ("box", "mask")


def paper_rows() -> list[dict[str, Any]]:
    """Table 7 for a file of results."""
    return [
        {"backbone": row.backbone, "method": row.method, "epochs": row.epochs}
        | dict(zip(("box_AP", "mask_AP"), row.numbers, strict=True))
        for row in TABLE_7
    ]


def detection_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers of a run as `aemim report` reads them.

    Args:
        report: Holds ``data``, ``images``, ``box`` and ``mask``, as ``results.json`` does.

    Returns:
        Rows of ``set``, ``metric`` such as ``box AP50``, ``value`` in percent and ``n`` images; there is none
        of a size of which there is no object, and there are no intervals.
    """
    name = Path(report["data"]).name
    return [
        {"set": name, "metric": f"{kind} {key}", "value": value, "n": report["images"]}
        for kind in _KINDS
        for key, value in report[kind].items()
        if value is not None
    ]


def precisions(rows: Sequence[Mapping[str, Any]]) -> list[float | None] | None:
    """AP of boxes and of masks in rows of results, the first of each; None: they are not of a detector."""
    found = [next((row["value"] for row in rows if row["metric"] == f"{kind} AP"), None) for kind in _KINDS]
    return None if found == [None, None] else found


def read_detection(path: str | Path) -> dict[str, Any]:
    """The results of a run of `aemim detect`.

    Args:
        path: Its ``results.json``.

    Returns:
        What tables need of it.

    Raises:
        ValueError: It cannot be read or is of another command; one line.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        kept = {key: content[key] for key in ("run", "encoder", "data", "images", "trained", *_KINDS)}
        for kind in _KINDS:
            kept[kind]["AP"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the results.json of a run of `aemim detect`") from error
    return kept


def detection_markdown(report: Mapping[str, Any]) -> str:
    """A run's average precision in the layout of Table 7.

    Args:
        report: As in ``results.json`` of ``aemim detect``.

    Returns:
        Markdown: first the run, in detail, then the table.
    """
    names = [*report["box"]]
    details = [[kind, *(_number(report[kind][name]) for name in names)] for kind in _KINDS]
    parts = [
        f"# {report['run']}",
        f"Average precision in percent on the {report['images']:,} images of {report['data']}, "
        f"{report['trained']}, from the encoder {report['encoder']}{_left_out(report)}.",
        markdown_table(["", *names], details),
        table_7({report["run"]: [report[kind]["AP"] for kind in _KINDS]}),
        f"The paper's rows are those of {SOURCE}; epochs are of the pre-training.",
    ]
    return "\n\n".join(parts) + "\n"


def _left_out(report: Mapping[str, Any]) -> str:
    """What the images were converted without, which makes them others than COCO's."""
    return f"; {report['broken']} broken images or annotations are left out" if report["broken"] else ""


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
