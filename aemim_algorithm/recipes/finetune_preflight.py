"""What can be known to fail before fine-tuning, and what is made of a recipe's section ``model``."""

from __future__ import annotations

import json
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
from aemim_algorithm.environment import write_json
from aemim_algorithm.exchange.architecture import architecture
from aemim_algorithm.exchange.files import read_encoder
from aemim_algorithm.exchange.trained import timm_encoder
from aemim_algorithm.models import MODELS
from aemim_algorithm.models.classifier import (
    Architecture,
    ImageClassifier,
    architecture_of,
    build_network,
    for_size,
    load_encoder,
)
from aemim_algorithm.recipes.datasets import is_remote
from aemim_algorithm.recipes.layers import RecipeError, first_line, known_names, recipe_values
from aemim_algorithm.recipes.options import check_options
from aemim_algorithm.recipes.preflight import check_place, check_space, continues
from aemim_algorithm.recipes.registry import Parts, parts_around
from aemim_algorithm.recipes.schema import DataRecipe, FineTuneRecipe

__all__ = ["CLASSES", "RANDOM", "Plan", "classes_of", "keep_architecture", "prepare_finetuning"]

RANDOM = "random"
ARCHITECTURE = "architecture.json"  # in the save folder: a run continues without its encoder
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
    for section, name in (("algorithms", "aemim"), ("callbacks", "reconstruction_pictures")):
        if any(given.replace("_", "").lower() == name.replace("_", "") for given in getattr(recipe, section)):
            raise RecipeError(f"{section}.{name}: belongs to pre-training; leave it out")
    check_place(recipe)
    try:
        return _checked(recipe, _encoder(recipe))
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


def keep_architecture(recipe: FineTuneRecipe, plan: Plan) -> None:
    """Note the encoder's architecture in the save folder, where a run that continues finds it."""
    write_json(plan.encoder, Path(recipe.save_folder, ARCHITECTURE))


def _kept(recipe: FineTuneRecipe) -> Architecture | None:
    """What `keep_architecture` noted, of a run that continues."""
    path = Path(recipe.save_folder, ARCHITECTURE)
    if not continues(recipe) or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"name": str(found["name"]), "kwargs": dict(found["kwargs"])}
    except (ValueError, KeyError, TypeError):
        return None  # the encoder tells it too


def _encoder(recipe: FineTuneRecipe) -> Architecture:
    """The architecture that a recipe names, or the one of the run that its encoder lies beside."""
    model = recipe.model
    if (kept := _kept(recipe)) is not None:
        return kept
    path = None if model.encoder == RANDOM else Path(model.encoder)
    if path is not None and not path.exists():
        raise RecipeError(
            f"model.encoder={path}: no such file; expected an encoder.pt of `aemim pretrain` or `aemim "
            f"export`, or {RANDOM}"
        )
    if path is not None and not continues(recipe):
        _check_statistics(recipe, path)
    if model.name is not None and model.name not in MODELS:
        return {"name": model.name, "kwargs": _timm_options(model.name, model.options)}
    if model.name is not None:
        options = check_options(MODELS[model.name], model.options, key="model.options")
        return _described(MODELS[model.name](**options))
    if model.options:
        raise RecipeError("model.options: expected model.name, which they are for")
    beside = architecture(None, path) if path is not None else None
    if beside is None:
        raise RecipeError(
            "model.name has no value: set it to a ViT or Swin of timm, such as vit_base_patch16_224, or a "
            "model of this package"
            + (f"; there is no recipe.yaml beside {path} that tells it" if path is not None else "")
        )
    return _described(beside)


def _check_statistics(recipe: FineTuneRecipe, encoder: Path) -> None:
    """Refuse to normalise images otherwise than the encoder has seen them."""
    beside = encoder.parent / "recipe.yaml"
    if not beside.is_file():
        return
    theirs = recipe_values(beside).get("data") or {}
    for key in ("mean", "std"):
        before = [float(value) for value in theirs.get(key) or getattr(DataRecipe, key)]
        now = [*getattr(recipe.data, key)]
        if before != now:
            raise RecipeError(
                f"data.{key}={now}: the encoder {encoder} was pre-trained with other "
                f"statistics, says the recipe.yaml beside it; set data.{key}=[{','.join(map(str, before))}]"
            )


def _timm_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    import timm

    if not timm.is_model(name):
        known = [*MODELS, *timm.list_models("vit_*"), *timm.list_models("swin_*")]
        hint = known_names(name, known) if len(known) < 20 else _nearest(name, known)
        raise RecipeError(f"model.name={name}: neither a model of timm nor of this package; {hint}")
    return dict(options)


def _nearest(name: str, known: list[str]) -> str:
    hint = known_names(name, known)
    return hint if hint.startswith("did") else "expected one such as vit_base_patch16_224"


def _described(model: ComposerModel) -> Architecture:
    return architecture_of(timm_encoder(model))


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
