"""Two processes that train with a probe that is slow, or fails, for `test_online_probe`.

``python online_probe_worker.py SHARDS OUT slow|failing``
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from composer import Trainer
from composer.core import State
from composer.utils import dist
from conftest import normalised_images, tiny_mae
from ranks import join_world, run_ranks
from torch.utils.data import DataLoader, TensorDataset

from aemim_algorithm.callbacks import OnlineProbe
from aemim_algorithm.callbacks.history import History


class SlowProbe(OnlineProbe):
    """Takes half a second."""

    def scores(self, state: State) -> dict[str, float]:
        time.sleep(0.5)
        return super().scores(state)


class FailingProbe(OnlineProbe):
    """Fails at its second probe."""

    def scores(self, state: State) -> dict[str, float]:
        if state.timestamp.batch == 2:
            raise FloatingPointError("features of batch 2")
        return super().scores(state)


def train(shards: str, out: str, kind: str) -> None:
    """Four batches, with a probe after each; every process notes its clock, or why it ended."""
    join_world()
    probe = {"slow": SlowProbe, "failing": FailingProbe}[kind]
    model, data = tiny_mae(), TensorDataset(normalised_images(32), torch.arange(32))
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, batch_size=4, sampler=dist.get_sampler(data)),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01),
        max_duration="4ba",
        device="cpu",
        callbacks=[probe(train=shards, test=shards, image_size=16, interval="1ba")],
        loggers=[History(out)],
        progress_bar=False,
    )
    note = Path(out, f"{dist.get_global_rank()}.json")
    try:
        trainer.fit()
    except (FloatingPointError, ValueError) as error:
        note.write_text(json.dumps(f"{type(error).__name__}: {error}"))
        return
    trainer.close()
    note.write_text(json.dumps(trainer.state.timestamp.total_wct.total_seconds()))


if __name__ == "__main__":
    sys.exit(any(run_ranks(2, lambda rank: train(*sys.argv[1:]))))
