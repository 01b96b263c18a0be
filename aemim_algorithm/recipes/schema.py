"""Recipes: a typed schema, YAML files of differences over ``bases``, and ``key=value`` overrides.

A recipe is checked before any data is read or a model is built. Whatever is wrong with it is one
:class:`RecipeError`, whose single line names the file or override, the key and what is expected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, cast

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from aemim_algorithm.recipes.layers import (
    RecipeError,
    file_layers,
    first_line,
    merge_strictly,
    override_layers,
)

__all__ = ["Recipe", "RecipeError", "load_recipe", "recipe_yaml", "save_recipe"]

# omegaconf reads `Optional[X]`, not `X | None`, inside a container's type.
Parts = dict[str, Optional[dict[str, Any]]]  # noqa: UP045


@dataclass
class DataRecipe:
    """Where images come from and how they are cropped and normalised.

    ``source`` is ``photos`` (the embedded photographs), an image folder, a tar of one, a folder of
    MDS shards or a URL of such a folder; ``test_source`` the same without the URL, for the final
    evaluation. What is not MDS is converted into ``cache`` on first use, with a short side of
    ``resize`` pixels (``None``: files as they are). ``crop_scale`` is the range of the crop's area,
    as a share of the image's; ``workers`` are loader processes per rank. ``mean`` and ``std`` are
    in units of the pixel range and hold for the attack as well.
    """

    source: str = MISSING
    test_source: str | None = None
    cache: str = "data_cache"
    resize: int | None = None
    skip_broken: bool = False
    workers: int = 2
    crop_scale: tuple[float, float] = MISSING
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD


@dataclass
class OptimizerRecipe:
    """AdamW; the learning rate is ``base_learning_rate`` · global batch / 256."""

    base_learning_rate: float = MISSING
    weight_decay: float = MISSING
    betas: tuple[float, float] = MISSING


@dataclass
class ScheduleRecipe:
    """Linear warm-up for ``warmup`` (such as ``15ep``), then a cosine to ``min_learning_rate``.

    With ``milestones`` (such as ``[700ep]``) steps in place of the cosine: at each of them the rate is
    multiplied by ``step_factor``.
    """

    warmup: str = MISSING
    min_learning_rate: float = MISSING
    milestones: list[str] = field(default_factory=list)
    step_factor: float = 0.1


@dataclass
class Recipe:
    """One pre-training run, complete.

    ``model``: ``name`` of a builder and its keyword arguments. ``algorithms``, ``callbacks`` and
    ``loggers``: names (``aemim``, ``reconstruction_pictures`` or any class of Composer's) with
    their keyword arguments or nothing. ``parallelism``: ``fsdp2`` or ``fsdp`` with its options;
    ``None`` is DDP. ``device_train_microbatch_size``: images per forward pass and device, all that
    the device gets if ``None``. ``init_from`` is a file of ``aemim import`` that the model starts
    from; a decoder that is not in it keeps its initialisation. Durations are Composer's: ``8ep``,
    ``100ba``. ``run_name`` is the file's name unless it is given; ``device`` and ``precision`` are the
    GPU and bfloat16 where there is one, else the CPU and float32.
    """

    run_name: str = MISSING
    seed: int = 17
    model: dict[str, Any] = MISSING
    init_from: str | None = None
    data: DataRecipe = field(default_factory=DataRecipe)
    algorithms: Parts = field(default_factory=dict)
    callbacks: Parts = field(default_factory=dict)
    loggers: Parts = field(default_factory=dict)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    max_duration: str = MISSING
    global_batch_size: int = MISSING
    device_train_microbatch_size: int | str | None = None
    precision: Literal["fp32", "amp_fp16", "amp_bf16"] | None = None
    device: Literal["cpu", "gpu", "mps"] | None = None
    parallelism: Parts | None = None
    compile: bool = False
    save_folder: str = "runs/${run_name}"
    save_interval: str = "1ep"
    autoresume: bool = True
    evaluate: bool = False


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: its bases in order, then the file itself, then the overrides.

    Args:
        path: YAML file. Its key ``bases`` lists further files, relative to itself.
        overrides: ``key=value`` each, where a dotted key reaches into a section.

    Returns:
        The recipe with every value resolved.

    Raises:
        RecipeError: For a missing file, a cycle of bases, an unknown key, a wrong type, a missing
            or impossible value; one line.
    """
    merged = OmegaConf.structured(Recipe)
    for origin, layer in [*file_layers(Path(path)), *override_layers(overrides)]:
        merged = merge_strictly(merged, layer, origin=origin)
    if OmegaConf.is_missing(merged, "run_name"):
        merged.run_name = Path(path).stem
    try:
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise RecipeError(f"{missing[0]} has no value: set it in the file or as {missing[0]}=…")
        recipe = cast(Recipe, OmegaConf.to_object(merged))
        _check_values(recipe)
    except (RecipeError, OmegaConfBaseException) as error:
        raise RecipeError(f"{path}: {first_line(error)}") from error
    return recipe


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, which :func:`load_recipe` reads back to an equal recipe."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(recipe_yaml(recipe), encoding="utf-8")
    partial.replace(path)


def _check_values(recipe: Recipe) -> None:
    """Refuse values that have the right type and cannot work."""
    data, optimizer, schedule = recipe.data, recipe.optimizer, recipe.schedule
    micro, low, high = recipe.device_train_microbatch_size, *data.crop_scale
    _require(recipe.global_batch_size >= 1, recipe, "global_batch_size", "at least 1")
    _require(0 <= recipe.seed < 2**32, recipe, "seed", "in [0, 2**32)")
    _require("://" not in recipe.save_folder, recipe, "save_folder", "a local folder")
    _require(
        micro in (None, "auto") or (isinstance(micro, int) and micro >= 1),
        recipe,
        "device_train_microbatch_size",
        "a number of images, at least 1, or auto",
    )
    _require(0 < low <= high <= 1, recipe, "data.crop_scale", "0 < low <= high <= 1")
    _require(data.workers >= 0, recipe, "data.workers", "at least 0")
    _require(data.resize is None or data.resize >= 1, recipe, "data.resize", "at least 1 pixel")
    _require(min(data.std) > 0, recipe, "data.std", "above 0")
    _require(optimizer.base_learning_rate > 0, recipe, "optimizer.base_learning_rate", "above 0")
    _require(optimizer.weight_decay >= 0, recipe, "optimizer.weight_decay", "at least 0")
    _require(all(0 <= beta < 1 for beta in optimizer.betas), recipe, "optimizer.betas", "in [0, 1)")
    _require(schedule.min_learning_rate >= 0, recipe, "schedule.min_learning_rate", "at least 0")
    _check_durations(recipe)
    _check_steps(recipe)
    _check_sources(recipe)


def _require(holds: bool, recipe: Recipe, key: str, expected: str) -> None:
    if not holds:
        value = OmegaConf.select(OmegaConf.structured(recipe), key)
        raise RecipeError(f"{key}={value}: expected {expected}")


def _check_durations(recipe: Recipe) -> None:
    example = "a duration such as 8ep, 100ba or 5000sp"
    whole = re.compile(r"[1-9]\d*(ep|ba|sp)")
    share = re.compile(r"\d+(ep|ba|sp)|0?\.\d+dur")
    _require(bool(whole.fullmatch(recipe.max_duration)), recipe, "max_duration", example)
    interval = recipe.save_interval
    positive = bool(whole.fullmatch(interval)) or (
        interval.endswith("dur") and bool(share.fullmatch(interval))
    )
    _require(positive, recipe, "save_interval", example)
    warmup = recipe.schedule.warmup
    _require(bool(share.fullmatch(warmup)), recipe, "schedule.warmup", f"{example} or 0.05dur")
    total = recipe.max_duration
    comparable = warmup[-2:] == total[-2:]
    fits = not comparable or int(warmup[:-2]) < int(total[:-2])
    _require(fits, recipe, "schedule.warmup", f"less than max_duration={total}")
    mixed = "sp" in (warmup[-2:], total[-2:]) and not comparable and not warmup.endswith("dur")
    _require(not mixed, recipe, "schedule.warmup", f"the unit of max_duration={total}")


def _check_steps(recipe: Recipe) -> None:
    """The milestones of a rate that falls in steps."""
    schedule, total = recipe.schedule, recipe.max_duration
    times = [re.fullmatch(r"([1-9]\d*)(ep|ba|sp)", milestone) for milestone in schedule.milestones]
    key, unit = "schedule.milestones", total[-2:]
    _require(None not in times, recipe, key, "durations such as 700ep")
    inside = [int(time[1]) for time in times if time and time[2] == unit]
    rising = inside == sorted(set(inside)) and all(value < int(total[:-2]) for value in inside)
    _require(
        len(inside) == len(times) and rising, recipe, key, f"rising, in {unit}, below max_duration={total}"
    )
    _require(0 < schedule.step_factor < 1, recipe, "schedule.step_factor", "in (0, 1)")
    floorless = not times or schedule.min_learning_rate == 0
    _require(floorless, recipe, "schedule.min_learning_rate", "0 with milestones, which have no floor")


def _check_sources(recipe: Recipe) -> None:
    data = recipe.data
    remote = "://" in data.source
    for key, source in (("data.source", data.source), ("data.test_source", data.test_source)):
        exists = source in (None, "photos") or Path(str(source)).exists()
        _require(
            exists or (remote and key == "data.source"),
            recipe,
            key,
            "photos, an existing image folder, tar or MDS folder (no such path)",
        )
    if recipe.evaluate:
        _require(not remote, recipe, "data.source", "a local one under evaluate=true")
        tested = data.source == "photos" or data.test_source is not None
        _require(tested, recipe, "data.test_source", "test images under evaluate=true")
