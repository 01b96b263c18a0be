"""Two processes that train on shards with broken images, for `test_broken_images`."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.utils import dist
from conftest import tiny_mae
from ranks import join_world, run_ranks

from aemim_algorithm.callbacks.broken_images import BrokenImages
from aemim_algorithm.data.streaming import train_data


def outcome(shards: str, max_broken: int) -> dict[str, Any]:
    """What this process sees of one epoch."""
    options: dict[str, Any] = {"image_size": 16, "batch_size": 2, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    data = train_data(shards, max_broken=max_broken, shuffle=False, **options)
    model, callback = tiny_mae(), BrokenImages(max_broken)
    trainer = Trainer(
        model=model,
        train_dataloader=data,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01),
        max_duration="1ep",
        device="cpu",
        callbacks=[callback],
        progress_bar=False,
    )
    error = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit()
        except ValueError as raised:
            error = str(raised)
    batch = int(trainer.state.timestamp.batch)
    trainer.close()
    told = [str(warning.message) for warning in caught if "was replaced" in str(warning.message)]
    return {"error": error, "known": callback.state_dict()["known"], "warnings": told, "batch": batch}


def save(shards: str, out: str) -> None:
    """Train with as many broken images as there are allowed, and with one fewer."""
    join_world()
    outcomes = [outcome(shards, max_broken) for max_broken in (3, 2)]
    Path(out, f"{dist.get_global_rank()}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    sys.exit(any(run_ranks(2, lambda rank: save(*sys.argv[1:]))))
