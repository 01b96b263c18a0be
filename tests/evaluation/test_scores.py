"""Accuracies with known answers, and intervals against scipy's."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binomtest

from aemim_algorithm.evaluation.scores import Proportion, top1, topk, wilson_interval


@pytest.mark.parametrize(
    ("correct", "n"), [(0, 1), (1, 1), (0, 50), (7, 50), (49, 50), (50, 50), (38_123, 50_000)]
)
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_is_scipys(correct: int, n: int, level: float) -> None:
    expected = binomtest(correct, n).proportion_ci(level, method="wilson")
    assert wilson_interval(correct, n, level) == pytest.approx(
        (100 * expected.low, 100 * expected.high), abs=1e-9
    )


@pytest.mark.parametrize(
    ("correct", "n", "level"), [(1, 0, 0.95), (2, 1, 0.95), (-1, 3, 0.95), (1, 2, 1.0), (1, 2, 0.0)]
)
def test_impossible_counts_are_refused(correct: int, n: int, level: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        wilson_interval(correct, n, level)


def test_masking_changes_the_answer() -> None:
    logits = torch.tensor([[0.0, 9.0, 5.0, 1.0], [4.0, 0.0, 3.0, 9.0]])
    labels = torch.tensor([2, 0])
    assert top1(logits, labels).tolist() == [False, False]
    assert top1(logits, labels, subset=torch.tensor([2, 0])).tolist() == [True, True]
    assert top1(logits, labels, subset=torch.tensor([3, 2])).tolist() == [True, False]


def test_top_k_counts_the_first_k() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 4)
    assert topk(logits, torch.arange(4), k=2).tolist() == [True, True, False, False]
    assert topk(logits, torch.arange(4), k=9).all()


def test_a_proportion_counts_over_batches() -> None:
    count = Proportion()
    count.add(torch.tensor([True, False, True]))
    count.add(torch.tensor([False]))
    summary = count.summary()
    assert (summary["value"], summary["n"], summary["correct"]) == (50.0, 4, 2)
    assert summary["low"] < 50.0 < summary["high"]
