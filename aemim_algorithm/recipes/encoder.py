"""The encoder that a run starts from: its architecture by the recipe, and what no such run can have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from composer.models import ComposerModel

from aemim_algorithm.environment import write_json
from aemim_algorithm.exchange.architecture import architecture
from aemim_algorithm.exchange.trained import timm_encoder
from aemim_algorithm.models import MODELS
from aemim_algorithm.models.classifier import Architecture, architecture_of
from aemim_algorithm.recipes.layers import RecipeError, known_names, recipe_values
from aemim_algorithm.recipes.options import check_options
from aemim_algorithm.recipes.preflight import continues
from aemim_algorithm.recipes.schema import DataRecipe, StartRecipe, TrainingRecipe

__all__ = ["RANDOM", "encoder_architecture", "keep_architecture", "refuse_pretraining"]

RANDOM = "random"
ARCHITECTURE = "architecture.json"  # in the save folder: a run continues without its encoder


def refuse_pretraining(recipe: TrainingRecipe) -> None:
    """Raise `RecipeError` for parts of a recipe that belong to pre-training."""
    for section, name in (("algorithms", "aemim"), ("callbacks", "reconstruction_pictures")):
        if any(given.replace("_", "").lower() == name.replace("_", "") for given in getattr(recipe, section)):
            raise RecipeError(f"{section}.{name}: belongs to pre-training; leave it out")


def keep_architecture(recipe: TrainingRecipe, encoder: Architecture) -> None:
    """Note the encoder's architecture in the save folder, where a run that continues finds it."""
    write_json(encoder, Path(recipe.save_folder, ARCHITECTURE))


def encoder_architecture(recipe: TrainingRecipe, model: StartRecipe) -> Architecture:
    """The architecture that a recipe names, or the one of the run that its encoder lies beside.

    Args:
        recipe: A loaded recipe.
        model: Its section ``model``.

    Returns:
        The architecture; of a run that continues, the one that it was started with.

    Raises:
        RecipeError: Nothing tells it, it is unknown, or the encoder was pre-trained on images that were
            normalised otherwise.
    """
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


def _kept(recipe: TrainingRecipe) -> Architecture | None:
    """What `keep_architecture` noted, of a run that continues."""
    path = Path(recipe.save_folder, ARCHITECTURE)
    if not continues(recipe) or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"name": str(found["name"]), "kwargs": dict(found["kwargs"])}
    except (ValueError, KeyError, TypeError):
        return None  # the encoder tells it too


def _check_statistics(recipe: TrainingRecipe, encoder: Path) -> None:
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
