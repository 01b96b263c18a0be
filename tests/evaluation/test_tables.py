"""Tables: the paper's rows as printed, ours beside them, and what is missing said."""

from __future__ import annotations

from typing import Any

import pytest

from aemim_algorithm.evaluation.paper import TABLE_4, TABLE_5, TABLE_6
from aemim_algorithm.evaluation.tables import markdown, score


def _row(name: str, value: float, n: int = 100, **more: Any) -> dict[str, Any]:
    return {
        "set": name,
        "metric": "top1",
        "value": value,
        "n": n,
        "low": value - 1,
        "high": value + 1,
        **more,
    }


def _report(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"classifier": {"name": "net"}, "skipped": {}, "results": rows, **more}


def _cells(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if f"**{name}**" in line)
    return [cell.strip(" *") for cell in line.strip("|").split("|")]


def test_the_papers_scores_follow_from_its_columns() -> None:
    """A check of every number in Table 5: columns are rounded, so a score may be 0.1 off."""
    for row in TABLE_5:
        a, r, sketch, mce, printed = row.numbers
        assert score(a, r, sketch, mce) == pytest.approx(printed, abs=0.1), row
    assert {len(row.numbers) for row in TABLE_4} == {4}
    assert {len(row.numbers) for row in TABLE_6} == {5}


def test_table_4_holds_ours_in_the_right_columns() -> None:
    five = _row("imagenet", 96.5) | {"metric": "top5"}
    text = markdown(_report([_row("imagenet", 83.04), five, _row("v2", 71.26)]))
    assert _cells(text, "net") == ["–", "net", "–", "–", "83.0", "–", "71.3"]
    assert "| ViT-B | AEMIM | 800 | 6.1 | 83.8 | 88.5 | 74.0 |" in text
    assert "Table 5" not in text


def test_table_5_scores_only_what_is_complete() -> None:
    rows = [_row("a", 34.5), _row("r", 49.6), _row("sketch", 35.6)]
    assert _cells(markdown(_report(rows)), "net") == ["–", "net", "–", "34.5", "49.6", "35.6", "–", "–"]
    corruption = {
        "accuracy": {"fog": {"1": {"value": 50.0, "n": 9}, "2": {"value": 40.0, "n": 9}}},
        "error": {"fog": 55.0},
        "mCE": 49.8,
        "corruption_error": {"fog": 67.1},
        "unnormalised_error": 55.0,
        "preprocessing": "as they are",
        "incomplete": None,
    }
    text = markdown(_report(rows, imagenet_c=corruption))
    assert _cells(text, "net") == ["–", "net", "–", "34.5", "49.6", "35.6", "49.8", "42.5"]
    assert "| fog | 50.0 | 40.0 | 55.0 | 67.1 |" in text
    assert "unnormalised (not mCE): 55.00%. mCE, relative to AlexNet: 49.80%" in text
    part = corruption | {"incomplete": "5,000 of 50,000 images in each folder"}
    text = markdown(_report(rows, imagenet_c=part))
    assert _cells(text, "net")[-2:] == ["–", "–"]
    assert "Not to be compared with the paper: ImageNet-C (5,000 of 50,000 images in each folder)." in text
    assert "mCE, relative to AlexNet: 49.80% (5,000 of 50,000 images in each folder: not to be" in text


def test_an_incomplete_set_is_said() -> None:
    text = markdown(_report([_row("a", 12.0, n=30, official_n=7_500)]))
    assert "30 of 7,500" in text
    assert "Not to be compared with the paper: ImageNet-A (30 of 7,500 images)." in text
    text = markdown(_report([_row("imagenet", 12.0), _row("a", 12.0, n=7_600, official_n=7_500)]))
    table_4 = text[text.index("Table 4") : text.index("Table 5")]
    assert "Not to be compared" not in table_4
    assert "ImageNet-A (7,600 images, officially 7,500)" in text


def test_skipped_sets_are_said_first() -> None:
    text = markdown(_report([_row("clean", 12.0)], skipped={"a": "not given", "r": "x does not exist"}))
    assert "**Not evaluated:** a (not given); r (x does not exist)." in text.split("##")[0]


def test_attacks_fill_table_6_on_imagenet_only() -> None:
    rows = [
        _row("imagenet", 83.0),
        *(_row("imagenet", 80.0 - e, attack="fgsm", epsilon=e, steps=1) for e in (0.0, 2.0, 8.0)),
        _row("imagenet", 16.0, attack="pgd", epsilon=0.51, steps=20),
    ]
    text = markdown(_report(rows, attacks={"set": "imagenet", "images": "5,000 images"}))
    assert _cells(text[text.index("Table 4") :], "net") == ["–", "net", "–", "–", "83.0", "–", "–"]
    table = text[text.index("Table 6") :]
    assert _cells(table, "net") == ["–", "net", "–", "80.0", "–", "78.0", "–", "72.0"]
    assert "| pgd | 0.51 | 20 | 16.00 | 15.00 to 17.00 | 100 |" in text
    rows = [_row("clean", 80.0, attack="fgsm", epsilon=0.0, steps=1)]
    assert "Table 6" not in markdown(_report(rows, attacks={"set": "clean", "images": "all"}))


def test_published_numbers_have_their_difference() -> None:
    row = {
        "set": "a",
        "metric": "top1",
        "value": 10.0,
        "published": 10.5,
        "difference": -0.5,
        "within_interval": True,
    }
    assert "| ImageNet-A | top1 | 10.000 | 10.500 | -0.500 | yes |" in markdown(_report([], published=[row]))


def test_an_unfinished_evaluation_says_so_and_times_are_told() -> None:
    timing = {"imagenet+real": {"images": 100, "seconds": 2.0, "share_waiting": 0.25}}
    text = markdown(_report([], unfinished=["attacks"], complete=False, timing=timing))
    assert "**Incomplete:** attacks" in text.split("##")[0]
    assert "| imagenet+real | 100 | 2.0 | 25% |" in text
