"""What can be known to fail before fine-tuning, and what is made of a recipe's section ``model``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer.models import ComposerModel
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from aemim_algorithm.data.augmentation import RandAugment
from aemim_algorithm.data.shards import DESCRIPTION
from aemim_algorithm.data.streaming import class_names
from aemim_algorithm.exchange.files import read_encoder
from aemim_algorithm.models.classifier import (
    Architecture,
    ImageClassifier,
    build_network,
    for_size,
    load_encoder,
)
from aemim_algorithm.recipes.datasets import is_remote
from aemim_algorithm.recipes.encoder import RANDOM, encoder_architecture, refuse_pretraining
from aemim_algorithm.recipes.layers import RecipeError, first_line
from aemim_algorithm.recipes.preflight import check_place, check_space, continues
from aemim_algorithm.recipes.registry import Parts, parts_around
from aemim_algorithm.recipes.schema import FineTuneRecipe

__all__ = ["CLASSES", "Plan", "classes_of", "prepare_finetuning"]

CLASSES = 1000  # of the model that is tried before the data tells their number


@dataclass(frozen=True)
class Plan:
    """A recipe's model, before the number of classes is known.

    Attributes:
        encoder: The encoder's architecture, as it was trained.
        start: The encoder's weights; ``None``: training from scratch, or continued.
        image_size: Side of the images, in pixels.
        drop_path: Rate of stochastic depth in the last block.
        parts: What else the recipe names.
    """

    encoder: Architecture
    start: dict[str, Tensor] | None
    image_size: int
    drop_path: float
    parts: Parts

    def classifier(self, num_classes: int) -> Architecture:
        """What ``timm.create_model`` builds the classifier from."""
        options = {"num_classes": num_classes, "global_pool": "avg", "drop_path_rate": self.drop_path}
        sized = for_size(self.encoder, self.image_size)
        return sized | {"kwargs": sized["kwargs"] | options}

    def model(self, num_classes: int) -> ImageClassifier:
        """The classifier, with random weights."""
        return ImageClassifier(build_network(self.classifier(num_classes)), num_classes=num_classes)


def prepare_finetuning(recipe: FineTuneRecipe) -> Plan:
    """Check a recipe against this machine, its encoder and its own save folder.

    Args:
        recipe: A loaded recipe.

    Returns:
        What the recipe's model is made of.

    Raises:
        RecipeError: If the recipe cannot run here; one line.
    """
    refuse_pretraining(recipe)
    check_place(recipe)
    try:
        return _checked(recipe, encoder_architecture(recipe, recipe.model))
    except RecipeError:
        raise
    except (ValueError, RuntimeError, AssertionError, TypeError, ZeroDivisionError) as error:
        raise RecipeError(f"model: {first_line(error)}") from error


def classes_of(
    recipe: FineTuneRecipe, train_folder: Path, test_folder: Path
) -> tuple[tuple[str, ...] | None, int]:
    """Names and number of the classes.

    Shards at a URL, or of others, do not name their classes. The test images' names stand for them then, in
    the same order; their number has to be in the recipe.

    Args:
        recipe: A loaded recipe.
        train_folder: Folder of the training shards.
        test_folder: Folder of the test shards.

    Returns:
        The names in the order of the labels, ``None`` if nothing tells them; their number.

    Raises:
        RecipeError: The recipe gives another number than the data has, or nothing tells it.
    """
    data, wanted = recipe.data, recipe.model.classes
    named = not is_remote(data.source) and (train_folder / DESCRIPTION).is_file()
    if not named and wanted is None:
        raise RecipeError(
            f"model.classes has no value: {train_folder} has no {DESCRIPTION} that tells it; set it, or "
            "write the shards with `aemim data`"
        )
    folder, source = (train_folder, data.source) if named else (test_folder, data.test_source)
    names = tuple(class_names(folder)) if (folder / DESCRIPTION).is_file() else None
    count = len(names) if names is not None else wanted
    assert count is not None
    if wanted not in (None, count):
        raise RecipeError(f"model.classes={wanted}: expected {count}, the classes of {source}")
    if count < 2:
        raise RecipeError(f"data.source={data.source}: has {count} class, expected at least 2")
    return names, count


def _checked(recipe: FineTuneRecipe, encoder: Architecture) -> Plan:
    """Build the model once, as small as classes make it, and load the encoder into it."""
    with torch.device("meta"):
        bare = build_network(encoder)
    size = recipe.model.image_size or max(bare.patch_embed.img_size)
    if len({*bare.patch_embed.img_size}) > 1 and recipe.model.image_size is None:
        raise RecipeError(
            "model.image_size has no value: set the side of square images, in pixels; the encoder's are "
            f"{bare.patch_embed.img_size}"
        )
    _check_sizes(bare, size)
    fresh = recipe.model.encoder == RANDOM or continues(recipe)
    start = None if fresh else read_encoder(recipe.model.encoder)
    if recipe.augmentation.randaugment:
        RandAugment(recipe.augmentation.randaugment, image_size=size, mean=recipe.data.mean)
    plan = Plan(encoder, start, size, recipe.model.drop_path, parts_around(_unknown, recipe))
    model = plan.model(recipe.model.classes or CLASSES)
    if start is not None:
        whose = f"the encoder {recipe.model.encoder}"
        load_encoder(model.network, start, encoder, image_size=size, whose=whose)
    check_space(recipe, model)
    return plan


def _check_sizes(network: Any, size: int) -> None:
    cell = network.patch_embed.patch_size[0]
    if isinstance(network, SwinTransformer):
        cell *= 2 ** (len(network.layers) - 1)
    if size % cell:
        raise RecipeError(f"model.image_size={size}: expected a multiple of {cell}, the pixels of a feature")


def _unknown() -> ComposerModel:
    raise AssertionError("a classifier is built once the number of its classes is known")
