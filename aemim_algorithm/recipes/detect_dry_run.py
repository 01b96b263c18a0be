"""What ``aemim detect --dry-run`` says: the recipe, its size and its data, after all checks of a run."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from aemim_algorithm.data.detection_images import DetectionImages
from aemim_algorithm.recipes.datasets import test_shards, train_shards
from aemim_algorithm.recipes.detect_preflight import batches_of, inspect_objects, prepare_detection
from aemim_algorithm.recipes.detect_schema import DetectRecipe
from aemim_algorithm.recipes.dry_run import disk_line, learning_rate_line, millions
from aemim_algorithm.recipes.preflight import checkpoint_bytes
from aemim_algorithm.recipes.schema import recipe_yaml

__all__ = ["dry_run_detection"]


def dry_run_detection(recipe: DetectRecipe) -> str:
    """Resolve and check a recipe of detection, without training and without writing anything.

    Time and memory are not among it: a step depends on how many proposals it finds; `benchmarks/detection.py`
    measures one.

    Args:
        recipe: A loaded recipe.

    Returns:
        A report of several lines.

    Raises:
        RecipeError: If the recipe cannot run here, or does not fit the data.
        ValueError: If the data cannot be read.
    """
    plan = prepare_detection(recipe)
    test_folder = test_shards(recipe.data)
    assert test_folder is not None  # a recipe without test images does not load
    images, tests = DetectionImages(train_shards(recipe.data), train=True), DetectionImages(test_folder)
    inspect_objects(recipe, images, tests)
    model = plan.model(len(images.categories))
    backbone = _count(model.network.backbone.parameters())
    together = _count(model.parameters())
    trained = _count(value for value in model.parameters() if value.requires_grad)
    steps = batches_of(recipe.max_duration, recipe, len(images))
    return "\n".join(
        [
            recipe_yaml(recipe),
            f"parameters: backbone {millions(backbone)}, heads {millions(together - backbone)}, together "
            f"{millions(together)}, of which {millions(trained)} are trained",
            learning_rate_line(recipe),
            f"data: {len(images):,} training images with objects of {len(images.categories)} categories, "
            f"{len(tests):,} test images",
            f"length: {steps:,.0f} steps of {recipe.global_batch_size} images",
            disk_line(recipe, checkpoint_bytes(model)),
        ]
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(value.numel() for value in parameters)
