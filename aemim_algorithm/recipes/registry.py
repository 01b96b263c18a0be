"""From the names and options of a recipe to the objects that a Trainer takes.

Options are checked against the signature of what they are for, so a misspelt or mistyped one is a
:class:`RecipeError` with the nearest known name, before data is read or a model is built.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import composer.algorithms
import composer.callbacks
import composer.loggers
from composer.core import Algorithm, Callback
from composer.loggers import LoggerDestination
from composer.models import ComposerModel
from composer.utils import FSDPConfig

from aemim_algorithm.algorithm import AEMIM
from aemim_algorithm.callbacks import OnlineProbe, ReconstructionPictures
from aemim_algorithm.models import MODELS
from aemim_algorithm.recipes.datasets import PHOTOS, is_remote
from aemim_algorithm.recipes.layers import RecipeError, first_line, known_names
from aemim_algorithm.recipes.options import check_options
from aemim_algorithm.recipes.parallel import HybridFSDP2Config
from aemim_algorithm.recipes.schema import Recipe, TrainingRecipe

__all__ = [
    "ALGORITHMS",
    "CALLBACKS",
    "LOGGERS",
    "Parts",
    "build_parts",
    "model_builder",
    "parts_around",
    "snake_case",
]

Builder = Callable[..., Any]


@dataclass(frozen=True)
class Parts:
    """What a recipe names, built: ready for the Trainer."""

    model: Callable[[], ComposerModel]
    algorithms: list[Algorithm]
    callbacks: list[Callback]
    loggers: list[LoggerDestination]
    parallelism: dict[str, Any] | None


def build_parts(recipe: Recipe) -> Parts:
    """Build everything that a recipe names, except the model.

    Args:
        recipe: A loaded recipe.

    Returns:
        The objects, and a function that builds the model.

    Raises:
        RecipeError: For an unknown name or option, or a value that its owner refuses; one line.
    """
    return parts_around(model_builder(recipe), recipe)


def parts_around(model: Callable[[], ComposerModel], recipe: TrainingRecipe) -> Parts:
    """Build what a recipe of any kind names beside its model; see :func:`build_parts`."""
    pixels = {"mean": recipe.data.mean, "std": recipe.data.std}
    pictures = {"folder": str(Path(recipe.save_folder, "pictures"))}
    size = {"image_size": recipe.model["image_size"]} if isinstance(recipe, Recipe) else {}
    given = {"reconstruction_pictures": pixels | pictures, "online_probe": pixels | size}
    callbacks = _build_all("callbacks", recipe.callbacks, CALLBACKS, given)
    _check_probes(callbacks, recipe)
    return Parts(
        model=model,
        algorithms=_build_all("algorithms", recipe.algorithms, ALGORITHMS, {"aemim": pixels}),
        # Probes first: they set the clock right that others read.
        callbacks=sorted(callbacks, key=lambda callback: not isinstance(callback, OnlineProbe)),
        loggers=_build_all("loggers", recipe.loggers, LOGGERS, {}),
        parallelism=_parallelism(recipe.parallelism),
    )


def model_builder(recipe: Recipe) -> Callable[[], ComposerModel]:
    """The function that builds a recipe's model; its name and options are checked now."""
    options = dict(recipe.model)
    name = options.pop("name", None)
    if name not in MODELS:
        hint = known_names(str(name), MODELS)
        raise RecipeError(f"model.name={name}: unknown model; {hint}")
    if not isinstance(options.get("image_size"), int):
        size = options.get("image_size")
        raise RecipeError(f"model.image_size={size}: expected the side of the images, in pixels")
    builder = MODELS[name]
    for key in {"mean", "std"} & set(inspect.signature(builder).parameters):
        options.setdefault(key, getattr(recipe.data, key))  # of a model that needs the pixels themselves
    checked = check_options(builder, options, key="model")
    return lambda: builder(**checked)


def snake_case(name: str) -> str:
    """``GradientClipping`` -> ``gradient_clipping``, ``NaNMonitor`` -> ``nan_monitor``."""
    return re.sub(r"(?<=.)(?=[A-Z][a-z])", "_", name).lower()


def _of_module(module: Any, base: type) -> dict[str, Builder]:
    members = (getattr(module, name) for name in module.__all__)
    return {
        snake_case(member.__name__): member
        for member in members
        if inspect.isclass(member) and issubclass(member, base) and member is not base
    }


ALGORITHMS = _of_module(composer.algorithms, Algorithm) | {"aemim": AEMIM}
CALLBACKS = _of_module(composer.callbacks, Callback) | {
    "online_probe": OnlineProbe,
    "reconstruction_pictures": ReconstructionPictures,
}
LOGGERS = _of_module(composer.loggers, LoggerDestination)
# What parts of a recipe share, and where it is set.
_OWNERS = {"mean": "data.mean", "std": "data.std", "image_size": "model.image_size"}


def _build_all(
    section: str,
    named: Mapping[str, dict[str, Any] | None],
    known: Mapping[str, Builder],
    given: Mapping[str, dict[str, Any]],
) -> list[Any]:
    """Build the parts of one section; ``given`` holds what the rest of the recipe determines."""
    return [
        _build(f"{section}.{name}", _find(section, name, known), options or {}, given)
        for name, options in named.items()
    ]


def _find(section: str, name: str, known: Mapping[str, Builder]) -> tuple[str, Builder]:
    """A part by its name, in snake_case or CamelCase."""
    by_letters = {key.replace("_", ""): key for key in known}
    key = by_letters.get(name.replace("_", "").lower())
    if key is None:
        raise RecipeError(f"{section}.{name}: unknown; {known_names(snake_case(name), known)}")
    return key, known[key]


def _build(
    key: str,
    found: tuple[str, Builder],
    options: dict[str, Any],
    given: Mapping[str, dict[str, Any]],
) -> Any:
    name, builder = found
    determined = given.get(name, {})
    if fixed := [option for option in _OWNERS if option in options and option in determined]:
        raise RecipeError(f"{key}.{fixed[0]}: set {_OWNERS[fixed[0]]}, which holds here as well")
    accepted = {
        option: value
        for option, value in determined.items()
        if option in inspect.signature(builder).parameters
    }
    checked = accepted | check_options(builder, options, key=key)
    try:
        return builder(**checked)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{key}: {first_line(error)}") from error


def _check_probes(callbacks: Sequence[Callback], recipe: TrainingRecipe) -> None:
    """Refuse probes that would find no images, before any are read."""
    data, key = recipe.data, "callbacks.online_probe"
    for probe in callbacks:
        if not isinstance(probe, OnlineProbe):
            continue
        if not isinstance(recipe, Recipe):
            raise RecipeError(
                f"{key}: is for pre-training; data.test_source and eval_interval evaluate this run"
            )
        if recipe.parallelism:
            raise RecipeError(
                f"{key}: FSDP shards the weights: parallelism=null, or run `aemim probe` afterwards"
            )
        if probe.train is None and is_remote(data.source):
            raise RecipeError(
                f"{key}: data.source={data.source} is not on this machine: name a folder as train"
            )
        if probe.test is None and data.test_source is None and data.source != PHOTOS:
            raise RecipeError(f"{key}: needs test images: set data.test_source, or leave the callback out")


def _parallelism(named: Mapping[str, dict[str, Any] | None] | None) -> dict[str, Any] | None:
    """Composer's form: under the key ``fsdp`` in both cases, the class tells which one it is."""
    if not named:
        return None
    known: dict[str, Builder] = {"fsdp2": HybridFSDP2Config, "fsdp": FSDPConfig}
    if len(named) > 1:
        raise RecipeError(f"parallelism: expected one of {', '.join(known)}, got {list(named)}")
    ((name, options),) = named.items()
    if name not in known:
        raise RecipeError(f"parallelism.{name}: unknown; {known_names(name, known)}")
    if options and options.get("load_monolith_rank0_only"):
        raise RecipeError(
            f"parallelism.{name}.load_monolith_rank0_only=true: leaves wrong weights on all ranks "
            "but the first; leave it out"
        )
    # One file, which any number of processes, DDP, FSDP and `aemim export` read.
    given = {"state_dict_type": "full"} | (options or {})
    return {"fsdp": known[name](**check_options(known[name], given, key=f"parallelism.{name}"))}
