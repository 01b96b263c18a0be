"""Two processes: each image counts once, the score is that of one, and they train one model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from drawn_coco import draw
from ranks import run_script
from small_detectors import pretender

from aemim_algorithm.data.coco import convert_coco
from aemim_algorithm.data.detection_images import DetectionImages
from aemim_algorithm.detection.average_precision import AveragePrecision
from aemim_algorithm.detection.loading import scoring_objects


def test_two_processes_score_as_one_and_train_one_model(tmp_path: Path) -> None:
    draw(tmp_path, images=9)  # neither batches nor processes share them evenly
    shards = tmp_path / "shards"
    convert_coco(
        tmp_path / "annotations" / "instances_train.json", tmp_path / "train", shards, progress=False
    )
    run_script(Path(__file__).with_name("detection_processes_worker.py"), shards, tmp_path)
    model = pretender()
    scores = {}
    for name, metric in model.get_metrics().items():
        for batch in scoring_objects(DetectionImages(shards), batch_size=9).dataloader:
            model.update_metric(batch, model.eval_forward(batch), metric)
        assert isinstance(metric, AveragePrecision)
        metric.compute()
        scores[name] = metric.details
    assert 0.2 < (scores["box_AP"]["AP"] or 0) < 0.9
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for found, _, _ in ranks:
        for name, details in scores.items():
            assert found[name] == pytest.approx(details), name
    assert ranks[0][2] == ranks[1][2]
    untrained = {name: float(value.double().sum()) for name, value in model.named_parameters()}
    assert sum(ranks[0][2][name] != value for name, value in untrained.items()) > len(untrained) / 2
    seen = [identity for _, each, _ in ranks for identity in each]
    assert len(seen) == len({*seen})
