"""What a finished run of a study has to say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aemim_algorithm.callbacks.history import read_history

__all__ = ["outcome_of"]


def outcome_of(folder: Path) -> dict[str, Any]:
    """Read the histories and the evaluation of a run.

    Returns:
        ``seconds`` of training as measured; ``probes``, a list of
        ``batch``, ``knn`` and ``linear``; ``losses``, every hundredth of the way; ``scores`` in percent,
        where ``finetuned`` is on all test images and the others are on those of the evaluation.
    """
    history = read_history(folder / "pretrain")
    batches = [line for line in history if "eval" not in line]
    evaluated = json.loads((folder / "evaluate" / "results.json").read_text(encoding="utf-8"))
    finetuned = [line["eval"] for line in read_history(folder / "finetune") if "eval" in line][-1]
    every = max(1, len(batches) // 100)
    return {
        "seconds": batches[-1]["seconds"],
        "probes": [_probe(line) for line in history if "probe/linear" in line.get("eval", ())],
        "losses": [_losses(line) for line in batches[::every]],
        "scores": {"finetuned": 100 * finetuned["eval/top1"]} | _scores(evaluated),
        "corruptions": (evaluated.get("corruptions") or {}).get("accuracy"),
    }


def _probe(line: Mapping[str, Any]) -> dict[str, float]:
    scores = line["eval"]
    return {"batch": line["batch"], "knn": scores["probe/knn"], "linear": scores["probe/linear"]}


def _losses(line: Mapping[str, Any]) -> dict[str, float]:
    """The batch, its losses, and what was measured of the attack."""
    kept = ("loss/train/", "aemim/")
    return {"batch": line["batch"]} | {key: value for key, value in line.items() if key.startswith(kept)}


def _scores(evaluated: Mapping[str, Any]) -> dict[str, float]:
    """Accuracies in percent, by the names of the tables."""
    found = {}
    for row in evaluated["results"]:
        if row.get("attack"):
            found[f"{row['attack'].upper()} ε={row['epsilon']:g}"] = row["value"]
        elif row["metric"] == "top1":
            found[row["set"]] = row["value"]
        elif row["metric"] == "unnormalised corruption error":
            found["corruptions"] = 100 - row["value"]
    return found
