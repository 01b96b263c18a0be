"""What can be known to fail before any data is read or a model is built."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from torch import nn

from aemim_algorithm.adapters import apply_adapters
from aemim_algorithm.algorithm import AEMIM
from aemim_algorithm.callbacks import ReconstructionPictures
from aemim_algorithm.exchange.importing import require_start
from aemim_algorithm.recipes.layers import first_line
from aemim_algorithm.recipes.registry import Parts, build_parts
from aemim_algorithm.recipes.schema import Recipe, RecipeError, load_recipe
from aemim_algorithm.search import find_encoder, resolve_encoder

__all__ = ["continues", "device_of", "on_gpu", "precision_of", "prepare"]

# What a run cannot change on its way without becoming another run.
_IDENTITY = ("seed", "model", "init_from", "algorithms", "optimizer", "schedule", "global_batch_size")
_DATA_IDENTITY = ("source", "resize", "crop_scale", "mean", "std")


def prepare(recipe: Recipe) -> Parts:
    """Check a recipe against this machine and its own save folder, and build its parts.

    Args:
        recipe: A loaded recipe.

    Returns:
        The objects that the recipe names.

    Raises:
        RecipeError: If the recipe cannot run here; one line.
    """
    parts = build_parts(recipe)
    _check_machine(recipe)
    _check_resumable(recipe)
    _check_model(recipe, parts)
    return parts


def continues(recipe: Recipe) -> bool:
    """Whether a checkpoint of the run is there, so that nothing of its initial weights is needed."""
    return recipe.autoresume and _latest(recipe).exists()


def on_gpu(recipe: Recipe) -> bool:
    """Whether the run is on a GPU."""
    return recipe.device == "gpu" or (recipe.device is None and torch.cuda.is_available())


def device_of(recipe: Recipe) -> torch.device:
    """The device of this process."""
    return (
        torch.device("cuda", dist.get_local_rank())
        if on_gpu(recipe)
        else torch.device(recipe.device or "cpu")
    )


def precision_of(recipe: Recipe) -> str:
    """The precision of the run, as Composer calls it."""
    # Composer's own default on a GPU is float16, under which long MAE runs were seen to diverge.
    return recipe.precision or ("amp_bf16" if on_gpu(recipe) else "fp32")


def _check_model(recipe: Recipe, parts: Parts) -> None:
    """Run the model on the meta device, where nothing is computed, and give it AEMIM's adapters."""
    size, features = recipe.model["image_size"], None
    try:
        with torch.device("meta"), torch.no_grad():
            model = parts.model().to("meta")
            images = torch.empty(2, 3, size, size)
            model((images, torch.empty(2)))
            if recipe.evaluate:
                features = model.get_submodule("encoder")(images)
        if recipe.init_from is not None and not continues(recipe):
            require_start(model, recipe.init_from)
        for algorithm in parts.algorithms:
            if isinstance(algorithm, AEMIM):
                resolve_encoder(model, algorithm.encoder or find_encoder(model))
                apply_adapters(model, algorithm.adapter)
    except (ValueError, RuntimeError, AssertionError, TypeError, ZeroDivisionError) as error:
        raise RecipeError(f"model: {first_line(error)}") from error
    _check_uses(recipe, parts, model, features)


def _check_uses(recipe: Recipe, parts: Parts, model: nn.Module, features: Any) -> None:
    """Refuse pictures and probes of a model that has nothing for them: they would fail late in the run."""
    kind = type(model).__name__
    drawn = any(isinstance(callback, ReconstructionPictures) for callback in parts.callbacks)
    if drawn and not hasattr(model, "reconstruct"):
        raise RecipeError(
            f"callbacks.reconstruction_pictures: expected a model that paints what it hid, which {kind} does "
            "not; leave them out"
        )
    if recipe.evaluate and getattr(features, "ndim", 0) != 3:
        raise RecipeError(
            f"evaluate=true: expected an encoder that returns tokens, (batch, tokens, dim), got "
            f"{tuple(getattr(features, 'shape', ()))} from {kind}; evaluate=false"
        )


def _check_machine(recipe: Recipe) -> None:
    world = dist.get_world_size()
    if recipe.global_batch_size % world:
        raise RecipeError(
            f"global_batch_size={recipe.global_batch_size}: expected a multiple of the {world} processes"
        )
    if recipe.device == "gpu" and not torch.cuda.is_available():
        raise RecipeError("device=gpu: expected cpu, as torch finds no GPU here")
    if on_gpu(recipe):
        return
    if recipe.precision not in (None, "fp32"):
        raise RecipeError(f"precision={recipe.precision}: expected fp32, as there is no GPU")
    if recipe.parallelism and world > 1:
        raise RecipeError(
            f"parallelism.{next(iter(recipe.parallelism))}: expected null, which is DDP, as there is no GPU: "
            "between CPUs, gloo sums the gradients that FSDP averages (pytorch#162338)"
        )
    if recipe.device_train_microbatch_size == "auto":
        raise RecipeError("device_train_microbatch_size=auto: expected a number, as there is no GPU")


def _check_resumable(recipe: Recipe) -> None:
    """Refuse to go on with a run under other settings, or to write over it."""
    folder = Path(recipe.save_folder)
    if not (_latest(recipe).exists() and (folder / "recipe.yaml").exists()):
        return
    if not recipe.autoresume:
        raise RecipeError(
            f"save_folder={folder}: holds a run already; choose another run_name, or continue it "
            "with autoresume=true"
        )
    before, now = (_identity(run) for run in (load_recipe(folder / "recipe.yaml"), recipe))
    if changed := [key for key in now if now[key] != before[key]]:
        raise RecipeError(
            f"{changed[0]}: the run in {folder} was started with another value "
            f"({before[changed[0]]}, now {now[changed[0]]}); choose another run_name"
        )


def _latest(recipe: Recipe) -> Path:
    """Where Composer leaves a link to the last checkpoint."""
    return Path(recipe.save_folder, "latest-rank0.pt")


def _identity(recipe: Recipe) -> dict[str, Any]:
    values = asdict(recipe)
    return {key: values[key] for key in _IDENTITY} | {
        f"data.{key}": values["data"][key] for key in _DATA_IDENTITY
    }
