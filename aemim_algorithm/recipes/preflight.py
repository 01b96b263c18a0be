"""What can be known to fail before any data is read or a model is built."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from torch import nn

from aemim_algorithm.adapters import apply_adapters
from aemim_algorithm.algorithm import AEMIM
from aemim_algorithm.callbacks import ReconstructionPictures
from aemim_algorithm.data.space import existing_parent, free_bytes, in_units
from aemim_algorithm.exchange.importing import require_start
from aemim_algorithm.recipes.datasets import PHOTOS, is_remote, is_without_index
from aemim_algorithm.recipes.layers import first_line, load_onto
from aemim_algorithm.recipes.registry import Parts, build_parts
from aemim_algorithm.recipes.resuming import has_checkpoint
from aemim_algorithm.recipes.schema import Recipe, RecipeError, TrainingRecipe
from aemim_algorithm.search import find_encoder, resolve_encoder

__all__ = [
    "check_place",
    "check_space",
    "checkpoint_bytes",
    "checkpoints_kept",
    "continues",
    "device_of",
    "on_gpu",
    "precision_of",
    "prepare",
]

# What a run cannot change on its way without becoming another run.
_IDENTITY = (
    *("seed", "model", "init_from", "augmentation", "algorithms", "optimizer", "schedule"),
    "global_batch_size",
)
_DATA_IDENTITY = (
    "resize",
    "crop_scale",
    "mean",
    "std",
    "canonical_nodes",
    "resident",
)  # the images: data_preflight.py


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
    check_place(recipe)
    _check_model(recipe, parts)
    return parts


def check_place(recipe: TrainingRecipe) -> None:
    """Check a recipe of any kind against this machine and its own save folder.

    Args:
        recipe: A loaded recipe.

    Raises:
        RecipeError: If the recipe cannot run here; one line.
    """
    _check_machine(recipe)
    _check_sources(recipe)
    _check_resumable(recipe)
    _check_writable(recipe)


def continues(recipe: TrainingRecipe) -> bool:
    """Whether a checkpoint of the run is there, so that nothing of its initial weights is needed."""
    return recipe.autoresume and has_checkpoint(Path(recipe.save_folder))


def on_gpu(recipe: TrainingRecipe) -> bool:
    """Whether the run is on a GPU."""
    return recipe.device == "gpu" or (recipe.device is None and torch.cuda.is_available())


def device_of(recipe: TrainingRecipe) -> torch.device:
    """The device of this process."""
    return (
        torch.device("cuda", dist.get_local_rank())
        if on_gpu(recipe)
        else torch.device(recipe.device or "cpu")
    )


def precision_of(recipe: TrainingRecipe) -> str:
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
    check_space(recipe, model)


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


def checkpoint_bytes(model: nn.Module) -> int:
    """About what a checkpoint takes: the state of the model and AdamW's two moments, float32.

    Args:
        model: With AEMIM's adapters, if it trains with them; on any device, ``meta`` too.

    Returns:
        Bytes.
    """
    state = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    return state + 2 * 4 * trained


def checkpoints_kept(recipe: TrainingRecipe) -> int:
    """How many checkpoints lie in the save folder at once, with the one that is being written."""
    if recipe.keep_checkpoints is not None:
        return recipe.keep_checkpoints + 1
    total, interval = recipe.max_duration, recipe.save_interval
    if interval.endswith("dur"):
        return math.ceil(1 / float(interval[:-3]))
    if interval[-2:] == total[-2:]:
        return math.ceil(int(total[:-2]) / int(interval[:-2]))
    return 2  # it depends on the number of images


def check_space(recipe: TrainingRecipe, model: nn.Module) -> None:
    """Refuse a disk that cannot hold the checkpoints of a run, with `RecipeError`."""
    folder = Path(recipe.save_folder)
    kept, size = checkpoints_kept(recipe), checkpoint_bytes(model)
    there = sum(path.stat().st_size for kind in ("*.pt", "*.distcp") for path in folder.rglob(kind))
    needed, free = kept * size - there, free_bytes(folder)
    if needed > free:
        raise RecipeError(
            f"save_folder={folder}: {in_units(free)} free, {in_units(needed)} needed for {kept} checkpoints "
            f"of {in_units(size)}: free some space, choose another disk or lower keep_checkpoints"
        )


def _check_writable(recipe: TrainingRecipe) -> None:
    parent = existing_parent(Path(recipe.save_folder))
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise RecipeError(
            f"save_folder={recipe.save_folder}: expected a folder that can be written; {parent} cannot"
        )


def _check_sources(recipe: TrainingRecipe) -> None:
    """Here, not where a recipe is loaded: a saved one may outlive the place of its data."""
    for key in ("source", "test_source"):
        source = getattr(recipe.data, key)
        remote = key == "source" and is_remote(source)
        if not (remote or source in (None, PHOTOS) or Path(source).exists()):
            raise RecipeError(
                f"data.{key}={source}: expected photos, an existing image folder, tar or MDS folder (no such "
                "path)"
            )
        if source and not remote and is_without_index(Path(source)):
            raise RecipeError(f"data.{key}={source}: has no index.json: get it again")


def _check_machine(recipe: TrainingRecipe) -> None:
    world = dist.get_world_size()
    if recipe.global_batch_size % world:
        raise RecipeError(
            f"global_batch_size={recipe.global_batch_size}: expected a multiple of the {world} processes"
        )
    if recipe.device == "gpu" and not torch.cuda.is_available():
        raise RecipeError("device=gpu: expected cpu, as torch finds no GPU here")
    options = next(iter((recipe.parallelism or {}).values()), None) or {}
    replicas = options.get("data_parallel_replicate_degree")
    if replicas is not None and not (isinstance(replicas, int) and replicas >= 1 and world % replicas == 0):
        raise RecipeError(
            f"parallelism.{next(iter(recipe.parallelism or {}))}.data_parallel_replicate_degree={replicas}: "
            f"expected a divisor of the {world} processes"
        )
    if on_gpu(recipe):
        return
    if recipe.precision == "amp_fp16":
        raise RecipeError("precision=amp_fp16: expected fp32 or amp_bf16, as there is no GPU")
    if recipe.parallelism and world > 1:
        raise RecipeError(
            f"parallelism.{next(iter(recipe.parallelism))}: expected null, which is DDP, as there is no GPU: "
            "between CPUs, gloo sums the gradients that FSDP averages (pytorch#162338)"
        )
    if recipe.device_train_microbatch_size == "auto":
        raise RecipeError("device_train_microbatch_size=auto: expected a number, as there is no GPU")


def _check_resumable(recipe: TrainingRecipe) -> None:
    """Refuse to go on with a run under other settings, or to write over it."""
    folder = Path(recipe.save_folder)
    if not has_checkpoint(folder):
        return
    if not recipe.autoresume:
        raise RecipeError(
            f"save_folder={folder}: holds a run already; choose another run_name, or continue it "
            "with autoresume=true"
        )
    if not (folder / "recipe.yaml").exists():
        return
    try:
        started = load_onto(type(recipe), folder / "recipe.yaml")
    except RecipeError as error:
        raise RecipeError(
            f"save_folder={folder}: holds a run of another kind ({error}); choose another run_name"
        ) from error
    before, now = _identity(started), _identity(recipe)
    for key in now:
        if now[key] != before[key]:
            path, was, is_now = _difference(key, before[key], now[key])
            raise RecipeError(
                f"{path}: the run in {folder} was started with another value ({was}, now {is_now}); choose "
                "another run_name"
            )


def _difference(key: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The first key in which two sections differ, and its values; the section's own if its keys differ."""
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        name = next(name for name in now if now[name] != before[name])
        return _difference(f"{key}.{name}", before[name], now[name])
    return key, before, now


def _identity(recipe: TrainingRecipe) -> dict[str, Any]:
    values = asdict(recipe)
    return {key: values[key] for key in _IDENTITY if key in values} | {
        f"data.{key}": values["data"][key] for key in _DATA_IDENTITY
    }
