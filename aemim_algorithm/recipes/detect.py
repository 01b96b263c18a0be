"""Detection as a recipe says: encoder, Mask R-CNN, Trainer, average precision, ``detector.pt``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.core import DataSpec, Evaluator
from composer.utils import dist
from torch.optim import AdamW

from aemim_algorithm.callbacks.history import FILE_NAME as HISTORY
from aemim_algorithm.data.detection_images import DetectionImages
from aemim_algorithm.detection.average_precision import AveragePrecision
from aemim_algorithm.detection.design import FILE_NAME, save_detector
from aemim_algorithm.detection.loading import scoring_objects, training_objects
from aemim_algorithm.detection.model import Detector, detector_groups
from aemim_algorithm.environment import environment, write_json, write_text
from aemim_algorithm.evaluation.detection import detection_markdown, detection_rows, paper_rows
from aemim_algorithm.recipes.detect_preflight import Plan, check_objects, prepare_detection
from aemim_algorithm.recipes.detect_schema import DetectRecipe
from aemim_algorithm.recipes.encoder import keep_architecture
from aemim_algorithm.recipes.preflight import on_gpu, precision_of
from aemim_algorithm.recipes.training import (
    before_the_end,
    fit,
    full_state,
    joined,
    learning_rate,
    make_trainer,
    running,
    seeded,
)

__all__ = ["RESULTS", "TABLE", "Detected", "build_detection", "detect"]

RESULTS, TABLE = "results.json", "results.md"
# Images of a forward pass in evaluation: beside another one an image is padded, which changes what it shows.
_SCORED = 1


@dataclass(frozen=True)
class Detected:
    """What a run left; ``box`` and ``mask`` are its average precision in percent, by COCO's names."""

    recipe: Path
    checkpoint: Path
    detector: Path
    history: Path
    results: Path
    table: Path
    box: dict[str, float | None]
    mask: dict[str, float | None]


def detect(recipe: DetectRecipe, *, command: Sequence[str] | None = None) -> Detected:
    """Run a recipe from its encoder and data to the scored detector; again, to continue it.

    Args:
        recipe: A loaded recipe.
        command: The command line, for the record; ``None``: this process's.

    Returns:
        The paths of what was written, and the average precision on all test images, on every rank.

    Raises:
        RecipeError: If the recipe cannot run here, or does not fit the data.
        FloatingPointError: If a loss or a gradient is not finite.
        OSError: If a checkpoint cannot be written; the earlier ones are whole.
        ValueError: If the data cannot be read, another run is at work in the save folder, or the run has
            checkpoints and all of them are damaged.
    """
    plan = prepare_detection(recipe)
    with joined(recipe) as (train_folder, test_folder):
        assert test_folder is not None  # a recipe without test images does not load
        images, tests = DetectionImages(train_folder, train=True), DetectionImages(test_folder)
        check_objects(recipe, images, tests)
        data = training_objects(
            images,
            batch_size=recipe.global_batch_size // dist.get_world_size(),
            seed=recipe.seed,
            workers=recipe.data.workers,
        )
        trainer = build_detection(recipe, plan, data, tests, num_classes=len(images.categories))
        with running(recipe, trainer) as folder:
            if dist.get_global_rank() == 0:
                keep_architecture(recipe, plan.design.encoder)
            fit(trainer)
            trainer.eval()
            box, mask = (_percent(trainer, name) for name in ("box_AP", "mask_AP"))
            state = full_state(trainer.state.model)
        if dist.get_global_rank() == 0:
            state = {name.removeprefix("network."): value for name, value in state.items()}
            save_detector(folder / FILE_NAME, design=plan.design, state=state, categories=images.categories)
            report = _report(recipe, tests, box, mask) | environment(command or sys.argv)
            write_json(report, folder / RESULTS)
            write_text(detection_markdown(report), folder / TABLE)
    return Detected(
        recipe=folder / "recipe.yaml",
        checkpoint=folder / "latest-rank0.pt",
        detector=folder / FILE_NAME,
        history=folder / HISTORY,
        results=folder / RESULTS,
        table=folder / TABLE,
        box=box,
        mask=mask,
    )


def build_detection(
    recipe: DetectRecipe, plan: Plan, data: DataSpec, tests: DetectionImages, *, num_classes: int
) -> Trainer:
    """The Trainer of a recipe, its model started from the encoder.

    Args:
        recipe: A loaded recipe.
        plan: Of `prepare_detection`.
        data: The training images.
        tests: The test images.
        num_classes: Number of categories.

    Returns:
        A Trainer whose ``fit`` starts the run, or continues it from where ``latest-rank0.pt`` links to.
    """
    model = seeded(recipe, lambda: plan.model(num_classes))
    assert isinstance(model, Detector)
    optimizer = recipe.optimizer
    groups = detector_groups(
        model.network,
        learning_rate=learning_rate(recipe),
        weight_decay=optimizer.weight_decay,
        layer_decay=optimizer.layer_decay,
    )
    evaluator = Evaluator(
        label="eval",
        dataloader=scoring_objects(tests, batch_size=_SCORED, workers=recipe.data.workers),
        eval_interval=before_the_end(recipe.eval_interval),
    )
    return make_trainer(
        recipe,
        plan.parts,
        model,
        data=data,
        optimizer=AdamW(groups, lr=learning_rate(recipe), betas=optimizer.betas),
        evaluators=[evaluator],
    )


def _percent(trainer: Trainer, name: str) -> dict[str, float | None]:
    metric = trainer.state.eval_metrics["eval"][name]
    assert isinstance(metric, AveragePrecision)
    return {key: None if value is None else 100 * value for key, value in metric.details.items()}


def _report(
    recipe: DetectRecipe, tests: DetectionImages, box: dict[str, float | None], mask: dict[str, float | None]
) -> dict[str, Any]:
    """What the results hold beside the environment; percent."""
    encoder = "frozen " * recipe.model.freeze_encoder + recipe.model.encoder
    report = {
        "run": recipe.run_name,
        "encoder": encoder,
        "data": str(recipe.data.test_source),
        "images": len(tests),
        "broken": tests.broken,
        "trained": f"trained for {recipe.max_duration} in batches of {recipe.global_batch_size}",
        "precision": precision_of(recipe) if on_gpu(recipe) else "fp32",  # of the evaluation
        "box": box,
        "mask": mask,
    }
    return report | {"results": detection_rows(report), "paper": paper_rows()}
