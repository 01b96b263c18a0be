"""A minute of training finds most of the objects that the project draws, where an untrained detector finds none."""

from __future__ import annotations

from pathlib import Path

import pytest
from drawn_coco import draw
from test_detect import of_pycocotools

from aemim_algorithm.data.coco import convert_coco
from aemim_algorithm.recipes.detect import detect
from aemim_algorithm.recipes.detect_schema import load_detection

RECIPE = """
model:
  encoder: random
  name: mae_vit_tiny_patch4
  options: {patch_size: 8, image_size: 64, embed_dim: 64, depth: 2, num_heads: 2}
  drop_path: 0.0
  window: 8
  global_blocks: 1
  short_sides: [64]
  long_side: 112
  heads:
    channels: 32
    box_width: 64
    mask_width: 16
    rpn_batch_size_per_image: 64
    rpn_pre_nms_top_n_train: 100
    rpn_post_nms_top_n_train: 60
    rpn_pre_nms_top_n_test: 100
    rpn_post_nms_top_n_test: 30
    box_batch_size_per_image: 32
data: {workers: 0}
optimizer: {base_learning_rate: 0.064, weight_decay: 0.05, betas: [0.9, 0.999], layer_decay: 0.9}
schedule: {warmup: 0ba, milestones: [9ep], min_learning_rate: 0.0}
max_duration: 10ep
global_batch_size: 8
eval_interval: 10ep
device: cpu
"""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for part, images in (("train", 240), ("test", 40)):
        draw(folder, images=images, part=part, crowd_every=8, empty_every=10)
        annotations = folder / "annotations" / f"instances_{part}.json"
        convert_coco(annotations, folder / part, folder / f"{part}-mds", progress=False)
    return folder


def test_training_lifts_average_precision_well_above_an_untrained_detectors(
    sets: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    places = [f"data.source={sets / 'train-mds'}", f"data.test_source={sets / 'test-mds'}"]
    untrained, trained = (
        detect(load_detection(tmp_path / "small.yaml", [*places, f"save_folder={tmp_path / name}", *more]))
        for name, more in (("untrained", ["max_duration=1ba", "schedule.milestones=[]"]), ("trained", []))
    )
    for kind, before, after in (
        ("bbox", untrained.box, trained.box),
        ("segm", untrained.mask, trained.mask),
    ):
        assert (before["AP"] or 0) < 1
        assert (after["AP"] or 0) > 20
        # Scores are those of the file, under COCO's own program, image by image.
        found = [-1 if value is None else value for value in after.values()]
        assert found == pytest.approx(of_pycocotools(kind, trained.detector, sets), abs=1e-3)
