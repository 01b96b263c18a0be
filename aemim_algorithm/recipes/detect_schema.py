"""The recipe of ``aemim detect``: a detector on an encoder, trained on shards of ``aemim data coco``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields
from pathlib import Path

from omegaconf import MISSING

from aemim_algorithm.detection.model import Heads
from aemim_algorithm.recipes.layers import RecipeError, load_onto
from aemim_algorithm.recipes.schema import DataRecipe, LayerDecayRecipe, StartRecipe, TrainingRecipe
from aemim_algorithm.recipes.values import check_training_values, is_interval, require

__all__ = ["DetectRecipe", "DetectionDataRecipe", "DetectorRecipe", "load_detection"]

_USED = {"source", "test_source", "workers", "mean", "std"}


@dataclass
class DetectionDataRecipe(DataRecipe):
    """Images with objects: local folders of shards that ``aemim data coco`` wrote.

    ``source`` is trained on and ``test_source`` scored; ``workers`` are loader processes per rank, ``mean``
    and ``std`` in units of the pixel range. The other keys of image data mean nothing here and are refused.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)


@dataclass
class DetectorRecipe(StartRecipe):
    """The detector; its encoder is a plain ViT.

    Blocks attend within windows of at most
    ``window`` patches a side (``null``: to everything), but for ``global_blocks`` of them, evenly spread.
    ``freeze_encoder``: only pyramid and heads are trained. ``short_sides``: images are resized to one of
    them, in pixels, drawn for each image in training, and to the last one in evaluation, unless the long side
    would exceed ``long_side``. ``heads`` are sizes of torchvision's Mask R-CNN.
    """

    window: int | None = 14
    global_blocks: int = 4
    freeze_encoder: bool = False
    short_sides: list[int] = MISSING
    long_side: int = MISSING
    heads: Heads = field(default_factory=Heads)


@dataclass
class DetectRecipe(TrainingRecipe):
    """One run of detection, complete: Mask R-CNN on ``data``, scored on ``data.test_source``.

    The test images are seen every ``eval_interval`` and at the end. ``activation_checkpointing``: blocks are
    computed again in backward, which takes about a fifth more time and saves memory.
    """

    data: DetectionDataRecipe = field(default_factory=DetectionDataRecipe)
    model: DetectorRecipe = field(default_factory=DetectorRecipe)
    optimizer: LayerDecayRecipe = field(default_factory=LayerDecayRecipe)
    eval_interval: str = "1ep"
    activation_checkpointing: bool = False


def load_detection(path: str | Path, overrides: Sequence[str] = ()) -> DetectRecipe:
    """Read a recipe of detection; see :func:`~aemim_algorithm.recipes.layers.load_onto`."""
    return load_onto(DetectRecipe, path, overrides, check=_check)


def _check(recipe: DetectRecipe) -> None:
    """Refuse values that have the right type and cannot work, on any machine."""
    check_training_values(recipe)
    _check_used(recipe)
    model = recipe.model
    require(0 < recipe.optimizer.layer_decay <= 1, recipe, "optimizer.layer_decay", "in (0, 1]")
    require(0 <= model.drop_path < 1, recipe, "model.drop_path", "in [0, 1)")
    require(model.window is None or model.window >= 1, recipe, "model.window", "at least 1 patch, or null")
    require(model.global_blocks >= 0, recipe, "model.global_blocks", "at least 0")
    sides = model.short_sides
    require(bool(sides) and min(sides) >= 1, recipe, "model.short_sides", "one or more, of at least 1 pixel")
    require(model.long_side >= max(sides), recipe, "model.long_side", f"at least {max(sides)} pixels")
    for item in fields(Heads):
        low = 0 if item.name == "box_score_thresh" else 1
        require(getattr(model.heads, item.name) >= low, recipe, f"model.heads.{item.name}", f"at least {low}")
    most = model.heads.box_detections_per_img
    require(most <= 100, recipe, "model.heads.box_detections_per_img", "at most 100, which COCO counts")
    require(is_interval(recipe.eval_interval), recipe, "eval_interval", "a duration such as 8ep or 100ba")
    require(recipe.data.test_source is not None, recipe, "data.test_source", "shards to be scored on")
    micro = "device_train_microbatch_size"
    require(getattr(recipe, micro) != "auto", recipe, micro, "a number: images are of many sizes")
    require(not recipe.compile, recipe, "compile", "false: images are of many sizes")
    require(not recipe.parallelism, recipe, "parallelism", "null: a detector is trained under DDP")


def _check_used(recipe: DetectRecipe) -> None:
    """Refuse what would have no effect."""
    for item in fields(DetectionDataRecipe):
        if item.name in _USED or item.default is NO_DEFAULT:
            continue
        if getattr(recipe.data, item.name) != item.default:
            raise RecipeError(
                f"data.{item.name}: leave it out: a detector sees whole images, of local shards that "
                "`aemim data coco` wrote"
            )
