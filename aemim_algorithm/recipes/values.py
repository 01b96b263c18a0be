"""Values of a recipe that have the right type and cannot work: one line each."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from omegaconf import OmegaConf
from streaming.base.util import bytes_to_int

from aemim_algorithm.recipes.layers import RecipeError

if TYPE_CHECKING:
    from aemim_algorithm.recipes.schema import FineTuneRecipe, Recipe, TrainingRecipe

__all__ = [
    "check_finetuning_values",
    "check_pretraining_values",
    "check_training_values",
    "is_interval",
    "require",
]

_EXAMPLE = "a duration such as 8ep, 100ba or 5000sp"
_WHOLE = re.compile(r"[1-9]\d*(ep|ba|sp)")
_SHARE = re.compile(r"\d+(ep|ba|sp)|0?\.\d+dur")


def check_pretraining_values(recipe: Recipe) -> None:
    """Refuse values that have the right type and cannot work, on any machine.

    Args:
        recipe: With a value for every key.

    Raises:
        RecipeError: Names the key, its value and what is expected.
    """
    check_training_values(recipe)
    if recipe.evaluate:
        remote = "://" in recipe.data.source
        require(not remote, recipe, "data.source", "a local one under evaluate=true")
        require(_has_test(recipe), recipe, "data.test_source", "test images under evaluate=true")


def check_finetuning_values(recipe: FineTuneRecipe) -> None:
    """Refuse values that have the right type and cannot work; see :func:`check_pretraining_values`."""
    check_training_values(recipe)
    model, augmentation = recipe.model, recipe.augmentation
    size, classes = model.image_size, model.classes
    require(0 < recipe.optimizer.layer_decay <= 1, recipe, "optimizer.layer_decay", "in (0, 1]")
    require(0 <= model.drop_path < 1, recipe, "model.drop_path", "in [0, 1)")
    require(size is None or size >= 1, recipe, "model.image_size", "at least 1 pixel")
    require(classes is None or classes >= 2, recipe, "model.classes", "at least 2")
    require(
        classes is not None or "://" not in recipe.data.source,
        recipe,
        "model.classes",
        "their number, as data.source is a URL",
    )
    for key in ("mixup", "cutmix"):
        require(getattr(augmentation, key) >= 0, recipe, f"augmentation.{key}", "at least 0")
    require(0 <= augmentation.switch_prob <= 1, recipe, "augmentation.switch_prob", "in [0, 1]")
    smoothing = augmentation.label_smoothing
    require(0 <= smoothing < 1, recipe, "augmentation.label_smoothing", "in [0, 1)")
    by_batch = not (recipe.data.resident and augmentation.randaugment)
    require(by_batch, recipe, "augmentation.randaugment", "null with data.resident=true")
    require(0 < recipe.evaluation_crop <= 1, recipe, "evaluation_crop", "in (0, 1]")
    require(is_interval(recipe.eval_interval), recipe, "eval_interval", _EXAMPLE)
    require(_has_test(recipe), recipe, "data.test_source", "test images, which a classifier is scored on")


def _has_test(recipe: TrainingRecipe) -> bool:
    return recipe.data.source == "photos" or recipe.data.test_source is not None


def check_training_values(recipe: TrainingRecipe) -> None:
    """Refuse values of what all runs are told; see :func:`check_pretraining_values`."""
    optimizer, schedule = recipe.optimizer, recipe.schedule
    micro = recipe.device_train_microbatch_size
    require(recipe.global_batch_size >= 1, recipe, "global_batch_size", "at least 1")
    keep = recipe.keep_checkpoints
    require(keep is None or keep >= 2, recipe, "keep_checkpoints", "at least 2, or null for all")
    require(recipe.dist_timeout > 0, recipe, "dist_timeout", "seconds, above 0")
    require(0 <= recipe.seed < 2**32, recipe, "seed", "in [0, 2**32)")
    require("://" not in recipe.save_folder, recipe, "save_folder", "a local folder")
    require(
        micro in (None, "auto") or (isinstance(micro, int) and micro >= 1),
        recipe,
        "device_train_microbatch_size",
        "a number of images, at least 1, or auto",
    )
    require(optimizer.base_learning_rate > 0, recipe, "optimizer.base_learning_rate", "above 0")
    require(optimizer.weight_decay >= 0, recipe, "optimizer.weight_decay", "at least 0")
    require(all(0 <= beta < 1 for beta in optimizer.betas), recipe, "optimizer.betas", "in [0, 1)")
    require(schedule.min_learning_rate >= 0, recipe, "schedule.min_learning_rate", "at least 0")
    peak = optimizer.base_learning_rate * recipe.global_batch_size / 256
    expected = f"at most the peak rate, {peak:.3g}"
    require(schedule.min_learning_rate <= peak, recipe, "schedule.min_learning_rate", expected)
    _check_durations(recipe)
    _check_steps(recipe)
    _check_data(recipe)


def require(holds: bool, recipe: TrainingRecipe, key: str, expected: str) -> None:
    """Raise `RecipeError` with a key, its value and what is expected, unless something holds."""
    if not holds:
        value = OmegaConf.select(OmegaConf.structured(recipe), key)
        raise RecipeError(f"{key}={value}: expected {expected}")


def _check_durations(recipe: TrainingRecipe) -> None:
    require(bool(_WHOLE.fullmatch(recipe.max_duration)), recipe, "max_duration", _EXAMPLE)
    require(is_interval(recipe.save_interval), recipe, "save_interval", _EXAMPLE)
    warmup = recipe.schedule.warmup
    require(bool(_SHARE.fullmatch(warmup)), recipe, "schedule.warmup", f"{_EXAMPLE} or 0.05dur")
    total = recipe.max_duration
    comparable = warmup[-2:] == total[-2:]
    fits = not comparable or int(warmup[:-2]) < int(total[:-2])
    require(fits, recipe, "schedule.warmup", f"less than max_duration={total}")
    mixed = "sp" in (warmup[-2:], total[-2:]) and not comparable and not warmup.endswith("dur")
    require(not mixed, recipe, "schedule.warmup", f"the unit of max_duration={total}")


def _check_steps(recipe: TrainingRecipe) -> None:
    """The milestones of a rate that falls in steps."""
    schedule, total = recipe.schedule, recipe.max_duration
    times = [re.fullmatch(r"([1-9]\d*)(ep|ba|sp)", milestone) for milestone in schedule.milestones]
    key, unit = "schedule.milestones", total[-2:]
    require(None not in times, recipe, key, "durations such as 700ep")
    inside = [int(time[1]) for time in times if time and time[2] == unit]
    rising = inside == sorted(set(inside)) and all(value < int(total[:-2]) for value in inside)
    require(
        len(inside) == len(times) and rising, recipe, key, f"rising, in {unit}, below max_duration={total}"
    )
    require(0 < schedule.step_factor < 1, recipe, "schedule.step_factor", "in (0, 1)")
    floorless = not times or schedule.min_learning_rate == 0
    require(floorless, recipe, "schedule.min_learning_rate", "0 with milestones, which have no floor")


def _check_data(recipe: TrainingRecipe) -> None:
    data, remote = recipe.data, "://" in recipe.data.source
    require(
        0 < data.crop_scale[0] <= data.crop_scale[1] <= 1, recipe, "data.crop_scale", "0 < low <= high <= 1"
    )
    require(data.workers >= 0, recipe, "data.workers", "at least 0")
    require(data.resize is None or data.resize >= 1, recipe, "data.resize", "at least 1 pixel")
    require(min(data.std) > 0, recipe, "data.std", "above 0")
    require(_is_size(data.cache_limit), recipe, "data.cache_limit", "bytes, such as 50gb")
    require(remote or data.cache_limit is None, recipe, "data.cache_limit", "null, as data.source is local")
    # The waits double: eight of them take four minutes.
    require(0 <= data.download_retries <= 8, recipe, "data.download_retries", "in [0, 8]")
    require(data.download_timeout > 0, recipe, "data.download_timeout", "above 0 seconds")
    require(data.max_broken >= 0, recipe, "data.max_broken", "at least 0")
    divides = data.canonical_nodes >= 1 and recipe.global_batch_size % data.canonical_nodes == 0
    divisor = f"a divisor of global_batch_size={recipe.global_batch_size}"
    require(divides, recipe, "data.canonical_nodes", divisor)
    if data.resident:
        require(not remote, recipe, "data.source", "a local one with data.resident=true")
        require(data.max_broken == 0, recipe, "data.max_broken", "0 with data.resident=true")


def is_interval(interval: str) -> bool:
    """Whether it is a time between two events that Composer reads: a duration or a share of the run."""
    share = interval.endswith("dur") and bool(_SHARE.fullmatch(interval))
    return share or bool(_WHOLE.fullmatch(interval))


def _is_size(limit: str | int | None) -> bool:
    try:
        return limit is None or bytes_to_int(limit) > 0
    except ValueError:
        return False
