"""What ``--dry-run`` says: the recipe, its size, and what it expects to cost."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import torch
from composer.utils import dist

from aemim_algorithm.algorithm import AEMIM
from aemim_algorithm.data.space import free_bytes, in_units
from aemim_algorithm.recipes.data_preflight import DataFound, inspect_data
from aemim_algorithm.recipes.datasets import is_remote, is_shards, place_of
from aemim_algorithm.recipes.estimate import Estimate, estimate, matmul_rate
from aemim_algorithm.recipes.finetune_preflight import CLASSES, prepare_finetuning
from aemim_algorithm.recipes.preflight import checkpoints_kept, device_of, precision_of, prepare
from aemim_algorithm.recipes.schema import (
    FineTuneRecipe,
    Recipe,
    RecipeError,
    TrainingRecipe,
    recipe_yaml,
)
from aemim_algorithm.recipes.training import learning_rate, microbatch_of

__all__ = ["count_images", "disk_line", "dry_run", "learning_rate_line", "millions"]

_DTYPES = {"fp32": torch.float32, "amp_fp16": torch.float16, "amp_bf16": torch.bfloat16}


def dry_run(recipe: Recipe | FineTuneRecipe, *, seconds: float = 1.0) -> str:
    """Resolve and check a recipe, and estimate its cost, without training.

    Args:
        recipe: A loaded recipe.
        seconds: How long to measure this device's speed.

    Returns:
        A report of several lines.

    Raises:
        RecipeError: If the recipe cannot run here.
    """
    cost = _cost(recipe)
    device = device_of(recipe)
    rate = matmul_rate(device, _DTYPES[precision_of(recipe)], seconds=seconds)
    found = _data(recipe)
    images = count_images(recipe.data.source) if found is None else found.samples
    lines = [recipe_yaml(recipe), *_size(recipe, cost), *_memory(recipe, cost)]
    lines += [*_time(recipe, cost, rate, device, images)]
    lines.append(f"data: {found or 'to be converted into shards first'}")
    # A checkpoint has no gradients.
    return "\n".join([*lines, disk_line(recipe, cost.state_bytes * 3 // 4)])


def _cost(recipe: Recipe | FineTuneRecipe) -> Estimate:
    if isinstance(recipe, FineTuneRecipe):
        plan = prepare_finetuning(recipe)
        classes = recipe.model.classes or CLASSES
        return estimate(lambda: plan.model(classes), image_size=plan.image_size)
    parts = prepare(recipe)
    algorithm = next((part for part in parts.algorithms if isinstance(part, AEMIM)), None)
    return estimate(parts.model, image_size=recipe.model["image_size"], algorithm=algorithm)


def count_images(source: str) -> int | None:
    """How many images a source holds, without opening one; ``None`` if only reading it would tell.

    Args:
        source: As in a recipe: shards, an image folder, a tar, a URL or ``photos``.

    Returns:
        The number of samples, or of files.
    """
    path = Path(source)
    if is_shards(source):
        shards = json.loads((path / "index.json").read_text(encoding="utf-8"))["shards"]
        return sum(shard["samples"] for shard in shards)
    if path.is_dir():
        return sum(1 for file in path.rglob("*") if file.is_file())
    if path.is_file() and not is_remote(source):
        try:
            with tarfile.open(path) as archive:
                return sum(1 for member in archive if member.isfile())
        except tarfile.TarError as error:
            raise RecipeError(f"data.source={source}: expected a tar of images ({error})") from error
    return None


def learning_rate_line(recipe: TrainingRecipe) -> str:
    """The learning rate, and where it comes from."""
    rate, batch = learning_rate(recipe), recipe.global_batch_size
    return f"learning rate: {rate:.3g} at its peak (base rate x {batch} / 256)"


def disk_line(recipe: TrainingRecipe, size: int) -> str:
    """What the checkpoints of a run take, of ``size`` bytes each, and what there is."""
    kept, free = checkpoints_kept(recipe), free_bytes(Path(recipe.save_folder))
    return (
        f"disk: about {in_units(kept * size)} for {kept} checkpoints of {in_units(size)}; "
        f"{in_units(free)} free for {recipe.save_folder}"
    )


def millions(count: int) -> str:
    """Such as ``85.80 M``."""
    return f"{count / 1e6:.2f} M"


def _size(recipe: TrainingRecipe, cost: Estimate) -> list[str]:
    if isinstance(recipe, FineTuneRecipe):
        parameters = f"parameters: {millions(cost.encoder + cost.other)}"
    else:
        parameters = (
            f"parameters: encoder {millions(cost.encoder)}, decoder {millions(cost.other)}, "
            f"together {millions(cost.encoder + cost.other)}; "
            f"adversarial copies {millions(cost.adversarial)}"
        )
    return [parameters, learning_rate_line(recipe)]


def _memory(recipe: TrainingRecipe, cost: Estimate) -> list[str]:
    micro = microbatch_of(recipe)
    images = 1 if isinstance(micro, str) else micro
    # Under autocast most of what is kept has half the width.
    width = 1.0 if precision_of(recipe) == "fp32" else 0.5
    activations = images * cost.activation_bytes * width
    total = _gibibytes(cost.state_bytes + activations)
    return [
        f"memory per device: about {total} = {_gibibytes(cost.state_bytes)} weights, gradients and "
        f"AdamW's moments + {_gibibytes(activations)} activations of {images} images",
        "  an estimate: not sharded, attention matrices stored, "
        "no buffers of the allocator or of communication",
    ]


def _data(recipe: TrainingRecipe) -> DataFound | None:
    """The training data as the preflight of a run finds it; ``None`` if it is not converted yet."""
    source = recipe.data.source
    folder = place_of(source, recipe.data, split="train")
    if not (is_remote(source) or is_shards(str(folder))):
        return None
    return inspect_data(recipe, folder, keep_index=False)


def _time(
    recipe: TrainingRecipe, cost: Estimate, rate: float, device: torch.device, images: int | None
) -> list[str]:
    world = dist.get_world_size()
    step = recipe.global_batch_size * cost.flops / (rate * world)
    total = _total_images(recipe, images)
    run = (
        "unknown before the data is converted"
        if total is None
        else _duration(total * cost.flops / (rate * world))
    )
    return [
        f"compute: {cost.flops / 1e9:.2f} GFLOP per image, {cost.flops_ratio:.2f} x the same "
        "step without AEMIM",
        f"time: at least {_duration(step)} per step of {recipe.global_batch_size} images, "
        f"the whole run {run}",
        f"  an estimate: {world} x {device.type} at the {rate / 1e12:.2f} TFLOP/s just measured on "
        "matrix products, no waiting for data: a lower bound",
    ]


def _total_images(recipe: TrainingRecipe, images: int | None) -> int | None:
    amount, unit = int(recipe.max_duration[:-2]), recipe.max_duration[-2:]
    if unit == "ba":
        return amount * recipe.global_batch_size
    if unit == "sp":
        return amount
    return None if images is None else amount * images


def _gibibytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s"
