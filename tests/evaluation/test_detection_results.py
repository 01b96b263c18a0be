"""A detector's results: Table 7 beside the paper's rows, in its own file, in reports and in evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from aemim_algorithm.evaluation.detection import (
    detection_markdown,
    detection_rows,
    paper_rows,
    precisions,
    read_detection,
)
from aemim_algorithm.evaluation.paper import TABLE_7
from aemim_algorithm.evaluation.report import report_markdown
from aemim_algorithm.evaluation.runs import read_runs
from aemim_algorithm.evaluation.tables import markdown

PAPER = "| ViT-B | AEMIM | 800 | 48.7 | 43.0 |"


def report_of(name: str, box: float, mask: float) -> dict[str, Any]:
    scores = {"AP": box, "AP50": box + 20, "APs": None}
    report = {
        "run": name,
        "encoder": "encoder.pt",
        "data": "shards/coco/val",
        "images": 5000,
        "broken": 0,
        "trained": "trained for 12ep in batches of 16",
        "box": scores,
        "mask": scores | {"AP": mask},
    }
    return report | {"results": detection_rows(report), "paper": paper_rows()}


def run_in(folder: Path, report: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": {"encoder": "random"}}))
    (folder / "history.jsonl").write_text("")
    (folder / "results.json").write_text(json.dumps(report))
    return folder


def test_table_7_is_the_papers() -> None:
    """Ten rows; AEMIM is the best of its backbone in both columns, and box is above mask everywhere."""
    assert len(TABLE_7) == len(paper_rows()) == 10
    for row in TABLE_7:
        box, mask = row.numbers
        assert box is not None
        assert mask is not None
        best = max(other.numbers for other in TABLE_7 if other.backbone == row.backbone)  # type: ignore[type-var]
        assert mask < box <= best[0]
    assert paper_rows()[-1] == {
        "backbone": "ViT-B",
        "method": "AEMIM",
        "epochs": 800,
        "box_AP": 48.7,
        "mask_AP": 43.0,
    }


def test_a_runs_own_file_has_details_and_the_table() -> None:
    lines = detection_markdown(report_of("mine", 41.25, 37.0)).splitlines()
    assert "| box | 41.2 | 61.2 | – |" in lines
    assert PAPER in lines
    assert lines[lines.index(PAPER) + 1] == "| – | **mine** | – | **41.2** | **37.0** |"
    assert lines[2].endswith("from the encoder encoder.pt.")
    left_out = detection_markdown(report_of("mine", 41.25, 37.0) | {"broken": 3})
    assert "encoder.pt; 3 broken images or annotations are left out." in left_out


def test_rows_leave_out_sizes_of_which_there_is_nothing() -> None:
    rows = report_of("mine", 41.25, 37.0)["results"]
    assert [(row["metric"], row["value"]) for row in rows] == [
        ("box AP", 41.25),
        ("box AP50", 61.25),
        ("mask AP", 37.0),
        ("mask AP50", 61.25),
    ]
    assert {(row["set"], row["n"]) for row in rows} == {("val", 5000)}
    assert precisions(rows) == [41.25, 37.0]
    assert precisions([{"metric": "top1", "value": 3.0}]) is None
    assert precisions(rows[:2]) == [41.25, None]


def test_detectors_are_side_by_side_in_a_report(tmp_path: Path) -> None:
    reports = {"random": report_of("a", 2.0, 1.0), "pretrained": report_of("b", 12.0, 10.0)}
    folders = [run_in(tmp_path / name, report) for name, report in reports.items()]
    text = report_markdown(read_runs(folders))
    assert "| val box AP | 2.00 | 12.00 |" in text
    table = text[text.index("## Table 7") :].splitlines()
    first = table.index(PAPER) + 1
    assert table[first : first + 2] == [
        "| – | **random** | – | **2.0** | **1.0** |",
        "| – | **pretrained** | – | **12.0** | **10.0** |",
    ]
    (folders[0] / "results.json").write_text(json.dumps({"results": []}))
    assert "## Table 7" not in report_markdown(read_runs(folders[:1]))


def test_an_evaluation_has_table_7_where_a_detector_is_named() -> None:
    report = {"classifier": {"name": "net"}, "skipped": {}, "results": []}
    assert "Table 7" not in markdown(report)
    text = markdown(report | {"detection": report_of("mine", 41.25, 37.0)})
    assert f"{PAPER}\n| – | **mine** | – | **41.2** | **37.0** |" in text
    assert "Ours is on 5,000 images of shards/coco/val, trained for 12ep in batches of 16, from the" in text


def test_results_of_another_command_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(report_of("mine", 41.25, 37.0)))
    assert read_detection(path)["mask"]["AP"] == 37.0
    assert "results" not in read_detection(path)
    for broken in ("{}", "[]", "no json", json.dumps(report_of("mine", 1.0, 1.0) | {"box": None})):
        path.write_text(broken)
        with pytest.raises(
            ValueError, match=r"results\.json: expected the results.json of a run of `aemim de"
        ):
            read_detection(path)
    with pytest.raises(ValueError, match="nowhere: expected the results.json"):
        read_detection("nowhere")
