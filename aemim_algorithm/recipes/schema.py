"""Recipes: a typed schema, YAML files of differences over ``bases``, and ``key=value`` overrides.

A recipe is checked before any data is read or a model is built. Whatever is wrong with it is one
:class:`RecipeError`, whose single line names the file or override, the key and what is expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

from omegaconf import MISSING, OmegaConf
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from aemim_algorithm.recipes.layers import RecipeError, load_onto
from aemim_algorithm.recipes.values import check_finetuning_values, check_pretraining_values

__all__ = [
    "FineTuneRecipe",
    "Recipe",
    "RecipeError",
    "StartRecipe",
    "TrainingRecipe",
    "load_finetuning",
    "load_recipe",
    "recipe_yaml",
    "save_recipe",
]

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

    Shards at a URL are downloaded into ``cache`` too, of which they take no more than ``cache_limit``
    bytes (or ``50gb``; ``None``: all of them). A download that takes longer than ``download_timeout``
    seconds, or fails, is repeated ``download_retries`` times, after 1, 2, 4, ... seconds. What arrives is
    compared with the hashes of its index, if that has any. ``verify: true`` requires them, and compares
    the shards that are on this machine before training as well; ``false`` compares sizes only.
    ``canonical_nodes`` is the most machines that the run is to use without downloading one another's
    shards; it decides the order of the samples, with the seed. ``max_broken`` is the number of samples
    that may turn out to be no images, and are replaced.

    ``resident``: the images, local and of one size, are decoded once and stay on the device, where whole
    batches are cropped; ``workers`` then does not matter.
    """

    source: str = MISSING
    test_source: str | None = None
    cache: str = "data_cache"
    resize: int | None = None
    skip_broken: bool = False
    workers: int = 2
    crop_scale: tuple[float, float] = MISSING
    cache_limit: str | int | None = None
    verify: bool | None = None
    download_retries: int = 2
    download_timeout: float = 60.0
    canonical_nodes: int = 1
    max_broken: int = 0
    resident: bool = False
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
class TrainingRecipe:
    """What a run of any kind is told.

    ``algorithms``, ``callbacks`` and ``loggers``: names (any class of Composer's, or of ours: ``aemim``,
    ``reconstruction_pictures``) with their keyword arguments or nothing. ``parallelism``: ``fsdp2`` or
    ``fsdp`` with its options; ``None`` is DDP. ``device_train_microbatch_size``: images per forward pass and
    device, all that the device gets if ``None``. Durations are Composer's: ``8ep``, ``100ba``. ``run_name``
    is the file's name unless it is given; ``device`` and ``precision`` are the GPU and bfloat16 where there
    is one, else the CPU and float32. ``keep_checkpoints`` of the newest are kept (``null``: all).
    ``on_nonfinite``: a batch whose loss or gradients are NaN or infinite stops the run, or is skipped, up to
    10 in a row. A process that waits ``dist_timeout`` seconds for the others ends the run.
    """

    run_name: str = MISSING
    seed: int = 17
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
    keep_checkpoints: int | None = 3
    autoresume: bool = True
    on_nonfinite: Literal["stop", "skip"] = "stop"
    dist_timeout: float = 300.0


@dataclass
class Recipe(TrainingRecipe):
    """One pre-training run, complete.

    ``model``: ``name`` of a builder and its keyword arguments. ``init_from`` is a file of ``aemim import``
    that the model starts from; a decoder that is not in it keeps its initialisation. ``evaluate``: k-NN and
    linear probe at the end.
    """

    model: dict[str, Any] = MISSING
    init_from: str | None = None
    evaluate: bool = False


@dataclass
class StartRecipe:
    """The encoder that a model starts from.

    ``encoder`` is an ``encoder.pt`` in timm's names, as a run or ``aemim export`` writes it, or ``random``:
    training from scratch. ``name`` is the encoder's architecture: a ViT or Swin of timm
    (``vit_base_patch16_224``) or of this package with ``options`` (``mae_vit_tiny_patch4``, {depth: 6}); by
    default the ``recipe.yaml`` beside the encoder tells it. ``drop_path`` is the rate of stochastic depth in
    the last block.
    """

    encoder: str = MISSING
    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    drop_path: float = MISSING


@dataclass
class ClassifierRecipe(StartRecipe):
    """The classifier.

    ``image_size`` is the side of the images, in pixels, ``None``: as the encoder was trained; position
    embeddings are interpolated to another one. ``classes`` is their number, ``None``: those of the training
    data.
    """

    image_size: int | None = None
    classes: int | None = None


@dataclass
class LayerDecayRecipe(OptimizerRecipe):
    """AdamW whose rate falls from the head, which has all of it, by ``layer_decay`` with each block."""

    layer_decay: float = MISSING


@dataclass
class AugmentationRecipe:
    """Augmentation beyond crop and mirroring.

    ``randaugment`` is a policy of timm's, ``mixup`` and ``cutmix`` are parameters of the beta distribution of
    the mixing ratio (0: none), ``switch_prob`` is how often CutMix is taken where both are on, and
    ``label_smoothing`` the share of a target that all classes have in equal parts.
    """

    randaugment: str | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    switch_prob: float = 0.5
    label_smoothing: float = 0.0


@dataclass
class FineTuneRecipe(TrainingRecipe):
    """One fine-tuning run, complete: a classifier on ``data``, tested on ``data.test_source``.

    The test images are seen every ``eval_interval`` and at the end. ``evaluation_crop`` is the side of their
    central crop over their short side.
    """

    model: ClassifierRecipe = field(default_factory=ClassifierRecipe)
    optimizer: LayerDecayRecipe = field(default_factory=LayerDecayRecipe)
    augmentation: AugmentationRecipe = field(default_factory=AugmentationRecipe)
    eval_interval: str = "1ep"
    evaluation_crop: float = 0.875


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe of pre-training; see :func:`~aemim_algorithm.recipes.layers.load_onto`."""
    return load_onto(Recipe, path, overrides, check=check_pretraining_values)


def load_finetuning(path: str | Path, overrides: Sequence[str] = ()) -> FineTuneRecipe:
    """Read a recipe of fine-tuning; see :func:`~aemim_algorithm.recipes.layers.load_onto`."""
    return load_onto(FineTuneRecipe, path, overrides, check=check_finetuning_values)


def recipe_yaml(recipe: TrainingRecipe) -> str:
    """The resolved recipe as YAML, which the function that loaded it reads back to an equal recipe."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def save_recipe(recipe: TrainingRecipe, path: Path) -> None:
    """Write the resolved recipe, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(recipe_yaml(recipe), encoding="utf-8")
    partial.replace(path)
