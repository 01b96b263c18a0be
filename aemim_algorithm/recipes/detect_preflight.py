"""What can be known to fail before detection, and what is made of a recipe's section ``model``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.models import ComposerModel
from composer.utils import dist
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from aemim_algorithm.data.detection_images import DetectionImages
from aemim_algorithm.data.index import check_shards
from aemim_algorithm.data.shards import DESCRIPTION
from aemim_algorithm.detection.backbone import ViTBackbone, load_encoder
from aemim_algorithm.detection.design import Design
from aemim_algorithm.detection.model import Detector, View
from aemim_algorithm.exchange.files import read_encoder
from aemim_algorithm.models.classifier import Architecture, stored_encoder
from aemim_algorithm.recipes.data_preflight import (
    DataFound,
    check_identity,
    fingerprint_of,
    note_fingerprint,
    on_each_machine,
)
from aemim_algorithm.recipes.datasets import is_remote, is_shards
from aemim_algorithm.recipes.detect_schema import DetectRecipe
from aemim_algorithm.recipes.encoder import RANDOM, encoder_architecture, refuse_pretraining
from aemim_algorithm.recipes.layers import RecipeError, first_line
from aemim_algorithm.recipes.preflight import check_place, check_space, continues
from aemim_algorithm.recipes.registry import Parts, parts_around

__all__ = ["Plan", "batches_of", "check_objects", "inspect_objects", "prepare_detection"]

_CATEGORIES = 80  # of the model that is tried before the data tells their number: COCO's


@dataclass(frozen=True)
class Plan:
    """A recipe's detector, before its categories are known.

    Attributes:
        design: Of the whole detector.
        start: The encoder's weights; ``None``: it starts at random, or is continued.
        whose: What the weights are called in a message.
        options: Of `Design.build`: what only training needs.
        parts: What else the recipe names.
    """

    design: Design
    start: dict[str, Tensor] | None
    whose: str
    options: dict[str, Any]
    parts: Parts

    def model(self, num_classes: int) -> Detector:
        """The detector; its encoder has the weights that it starts from."""
        network = self.design.build(num_classes, **self.options)
        if self.start is not None:
            assert isinstance(network.backbone, ViTBackbone)
            load_encoder(network.backbone, self.start, whose=self.whose)
        return Detector(network)


def prepare_detection(recipe: DetectRecipe) -> Plan:
    """Check a recipe against this machine, its encoder and its own save folder.

    Args:
        recipe: A loaded recipe.

    Returns:
        What the recipe's model is made of.

    Raises:
        RecipeError: If the recipe cannot run here; one line.
    """
    refuse_pretraining(recipe)
    _check_sources(recipe)
    check_place(recipe)
    try:
        plan = _planned(recipe)
        check_space(recipe, plan.model(_CATEGORIES))
        return plan
    except RecipeError:
        raise
    except (ValueError, RuntimeError, AssertionError, TypeError, ZeroDivisionError) as error:
        raise RecipeError(f"model: {first_line(error)}") from error


def check_objects(recipe: DetectRecipe, train: DetectionImages, test: DetectionImages) -> None:
    """Refuse to train on data that is too little, of two minds, or not that of the run so far.

    All processes call this; none trains before the last one has passed.

    Args:
        recipe: A loaded recipe.
        train: The training images.
        test: The test images.

    Raises:
        RecipeError: The recipe does not fit the data.
        ValueError: The data cannot be read as a whole.
    """
    found = on_each_machine(lambda: inspect_objects(recipe, train, test))
    if found is not None and dist.get_global_rank() == 0:
        note_fingerprint(recipe, found)


def inspect_objects(recipe: DetectRecipe, train: DetectionImages, test: DetectionImages) -> DataFound:
    """Look at the data as `check_objects` does, by this process alone, and write nothing."""
    folder = Path(recipe.data.source)
    if test.categories != train.categories:
        raise RecipeError(
            f"data.test_source={recipe.data.test_source}: its categories are not those of "
            f"data.source={folder}"
        )
    if len(train) < recipe.global_batch_size:
        raise RecipeError(
            f"global_batch_size={recipe.global_batch_size}: expected at most {len(train)}, the images with "
            f"objects of data.source={folder}"
        )
    if test.dropped:
        raise RecipeError(
            f"data.test_source={recipe.data.test_source}: {test.dropped} images without objects were left "
            "out, on which a detector may be wrong: write the shards without --drop-empty"
        )
    shards = check_shards(folder)
    samples, count = sum(shard["samples"] for shard in shards), len(shards)
    nothing = {"size": 0, "verified": 0, "leftovers": 0}
    found = DataFound(samples, shards=count, present=count, fingerprint=fingerprint_of(shards), **nothing)
    check_identity(recipe, found)
    _check_warmup(recipe, len(train))
    return found


def _check_warmup(recipe: DetectRecipe, images: int) -> None:
    """Refuse a warm-up that ends after the first step: Composer's scheduler looks at no step before."""
    schedule = recipe.schedule
    end = next(iter(schedule.milestones), recipe.max_duration)
    warmup, before = (batches_of(time, recipe, images) for time in (schedule.warmup, end))
    if warmup >= before:
        raise RecipeError(
            f"schedule.warmup={schedule.warmup}: expected fewer than the {before:.0f} batches until {end}, "
            f"as data.source={recipe.data.source} has {images} images with objects"
        )


def batches_of(time: str, recipe: DetectRecipe, images: int) -> float:
    """The batches of a time such as ``0.1dur`` or ``100ep``, with so many images to train on."""
    if time.endswith("dur"):
        return float(time[:-3]) * batches_of(recipe.max_duration, recipe, images)
    amount, size = int(time[:-2]), recipe.global_batch_size
    return {"ep": amount * (images // size), "ba": amount, "sp": amount / size}[time[-2:]]


def _check_sources(recipe: DetectRecipe) -> None:
    for key in ("source", "test_source"):
        source = getattr(recipe.data, key)
        if is_remote(source):
            raise RecipeError(
                f"data.{key}={source}: expected a local folder: copy the shards to this machine"
            )
        if not (is_shards(source) and Path(source, DESCRIPTION).is_file()):
            what = "no such folder" if not Path(source).exists() else f"has no index.json and {DESCRIPTION}"
            raise RecipeError(
                f"data.{key}={source}: expected a folder of shards that `aemim data coco` wrote ({what})"
            )


def _planned(recipe: DetectRecipe) -> Plan:
    model, data = recipe.model, recipe.data
    encoder = encoder_architecture(recipe, model)
    fresh = model.encoder == RANDOM or continues(recipe)
    start, whose = None if fresh else read_encoder(model.encoder), f"the encoder {model.encoder}"
    if start is not None:
        encoder = _as_stored(encoder, start, whose)
    design = Design(
        encoder=encoder,
        window=model.window,
        global_blocks=model.global_blocks,
        heads=model.heads,
        view=View(tuple(data.mean), tuple(data.std), tuple(model.short_sides), model.long_side),
    )
    options: dict[str, Any] = {"drop_path": model.drop_path, "frozen": model.freeze_encoder}
    options |= {"recompute": recipe.activation_checkpointing}
    return Plan(design, start, whose, options, parts_around(_unknown, recipe))


def _as_stored(architecture: Architecture, state: dict[str, Tensor], whose: str) -> Architecture:
    """The architecture at the image size that the weights are for: an export may have changed that."""
    stored = stored_encoder(architecture, state, whose)
    if not isinstance(stored, VisionTransformer):
        raise RecipeError(f"model.encoder: {whose} is a {type(stored).__name__}; expected a plain ViT")
    size = [*stored.patch_embed.img_size]
    return architecture | {"kwargs": architecture["kwargs"] | {"img_size": size}}


def _unknown() -> ComposerModel:
    raise AssertionError("a detector is built once the number of its categories is known")
