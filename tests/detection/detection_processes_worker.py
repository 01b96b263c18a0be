"""Two processes score, and train for a moment: see test_detection_processes.py.

``python detection_processes_worker.py SHARDS FOLDER``: writes ``<rank>.json`` into the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Evaluator
from ranks import join_world, run_ranks
from small_detectors import pretender

from aemim_algorithm.data.detection_images import DetectionImages
from aemim_algorithm.detection.loading import scoring_objects, training_objects


def run(rank: int, shards: Path, folder: Path) -> None:
    """One process."""
    join_world()
    model = pretender()
    train = training_objects(DetectionImages(shards, train=True), batch_size=2, seed=0)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, given: seen.extend(_ids(given[0])))
    trainer = Trainer(
        model=model,
        train_dataloader=train,
        eval_dataloader=Evaluator(
            label="eval", dataloader=scoring_objects(DetectionImages(shards), batch_size=2)
        ),
        optimizers=torch.optim.SGD(model.parameters(), lr=1e-3),
        max_duration="2ba",
        eval_interval="1ep",
        device="cpu",
        device_train_microbatch_size=1,
        progress_bar=False,
    )
    trainer.fit()
    trainer.eval()
    metrics: Any = trainer.state.eval_metrics["eval"]
    found = {name: metric.details for name, metric in metrics.items()}
    parameters = {name: float(value.double().sum()) for name, value in model.named_parameters()}
    (folder / f"{rank}.json").write_text(json.dumps([found, seen, parameters]))


def _ids(batch: dict[str, Any]) -> list[int]:
    return [target["image_id"] for target in batch["target"]]


if __name__ == "__main__":
    given = Path(sys.argv[1]), Path(sys.argv[2])
    if any(run_ranks(2, lambda rank: run(rank, *given))):
        sys.exit(1)
