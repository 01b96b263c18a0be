"""The architecture of a checkpoint, from the recipe beside it or by name."""

from __future__ import annotations

from pathlib import Path

from composer.models import ComposerModel

from aemim_algorithm.models import MODELS
from aemim_algorithm.recipes.layers import RecipeError, known_names, recipe_values
from aemim_algorithm.recipes.options import check_options

__all__ = ["architecture"]


def architecture(named: str | None, checkpoint: Path | None = None) -> ComposerModel | None:
    """Build the model that a checkpoint is of.

    Args:
        named: Name of a model, or a recipe's path.
        checkpoint: Without ``named``, the ``recipe.yaml`` in its folder is taken: ``aemim pretrain``
            leaves one there.

    Returns:
        The model, with random values; ``None`` if nothing tells it.

    Raises:
        RecipeError: If the name is unknown, or the recipe's model cannot be built.
    """
    if named is not None and named in MODELS:
        return _of_name(named)
    beside = checkpoint.parent / "recipe.yaml" if checkpoint is not None else None
    path = Path(named) if named else beside
    if path is None or (named is None and not path.is_file()):
        return None
    if path.suffix not in (".yaml", ".yml"):
        raise RecipeError(
            f"model={named}: expected a recipe (.yaml) or a model; {known_names(str(named), MODELS)}"
        )
    return _of_recipe(path)


def _of_name(name: str) -> ComposerModel:
    """A model that needs no more than its name."""
    try:
        return MODELS[name](**check_options(MODELS[name], {}, key="model"))
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}; name the run's recipe.yaml instead") from error


def _of_recipe(path: Path) -> ComposerModel:
    """Of its section ``model`` alone: its data may be gone by now."""
    options = recipe_values(path).get("model") or {}
    name = options.pop("name", None)
    if name not in MODELS:
        raise RecipeError(f"{path}: model.name={name}: unknown model; {known_names(str(name), MODELS)}")
    builder = MODELS[name]
    try:
        return builder(**check_options(builder, options, key="model"))
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{path}: {error}") from error
