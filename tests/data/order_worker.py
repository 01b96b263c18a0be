"""Reads the same cases in one, two and four processes, for `test_order`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from ranks import join_world, run_ranks

from aemim_algorithm.data.streaming import train_data

GLOBAL = 12


def loader(shards: Path, case: dict[str, Any]) -> Any:
    """The training data of this process."""
    return train_data(
        shards,
        image_size=8,
        batch_size=GLOBAL // dist.get_world_size(),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        workers=case["workers"],
        canonical_nodes=case.get("canonical_nodes", 1),
    ).dataloader


def read(shards: Path, case: dict[str, Any]) -> list[dict[str, Any]]:
    """The batches of one case: of whole epochs, or of the rest of one that was resumed, perhaps again."""
    data = loader(shards, case)
    if "resume" in case:
        state = {"epoch": 0, "shuffle_seed": 17, "num_canonical_nodes": 2, "initial_physical_nodes": 1}
        data.dataset.load_state_dict({**state, "sample_in_epoch": case["resume"] * GLOBAL})
    if "again_after" in case:
        iterator = iter(data)
        for _ in range(case["again_after"]):
            next(iterator)
        state = data.dataset.state_dict((case["resume"] + case["again_after"]) * GLOBAL, True)
        data = loader(shards, case)
        data.dataset.load_state_dict(state)
    epochs = case.get("epochs", 1)
    batches = [batch for _ in range(epochs) for batch in data]
    assert "resume" in case or len(batches) == epochs * len(data)
    return batches


def save(shards: Path, out: Path, cases: list[dict[str, Any]]) -> None:
    """Read every case as one process of several."""
    join_world()
    name = f"{dist.get_world_size()}-{dist.get_global_rank()}.pt"
    torch.save([read(shards, case) for case in cases], out / name)


if __name__ == "__main__":
    for ranks in (1, 2, 4):
        given = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
        if any(run_ranks(ranks, lambda rank, given=given: save(*given))):
            sys.exit(1)
