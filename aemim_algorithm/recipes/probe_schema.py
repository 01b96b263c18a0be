"""The recipe of ``aemim probe``, and what it takes from the one beside the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING

from aemim_algorithm.evaluation.mae_probe import MaeProbe
from aemim_algorithm.evaluation.probe import METHODS, ProbeSettings
from aemim_algorithm.recipes.datasets import PHOTOS, is_remote
from aemim_algorithm.recipes.layers import RecipeError, known_names, load_onto, recipe_values
from aemim_algorithm.recipes.schema import DataRecipe

__all__ = ["ProbeRecipe", "load_probe", "probe_settings"]


@dataclass
class ProbeDataRecipe:
    """Labelled images to learn from and to be scored on.

    The two halves of ``photos``, image folders, tars of them, or MDS shards. What is ``null`` is as in the
    ``recipe.yaml`` beside the encoder.
    """

    source: str | None = None
    test_source: str | None = None
    cache: str | None = None
    resize: int | None = None
    skip_broken: bool = False
    workers: int = 0
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


@dataclass
class KnnRecipe:
    """Neighbours that vote, and the temperature of their votes."""

    k: int = 20
    temperature: float = 0.07


@dataclass
class LogisticRecipe:
    """Logistic regression at its optimum."""

    weight_decay: float = 1e-3


@dataclass
class MaeProbeRecipe:
    """The linear probe as the MAE paper trains it; the rate is ``base_learning_rate`` · batch / 256."""

    epochs: int = 90
    warmup_epochs: int = 10
    batch_size: int = 16384
    base_learning_rate: float = 0.1
    seed: int = 17


@dataclass
class ProbeRecipe:
    """How to score one encoder.

    ``encoder`` is the ``encoder.pt`` of a run. ``model`` names its architecture, a recipe or a model's name;
    ``null``: the ``recipe.yaml`` beside it, where ``image_size`` (in pixels) and the data are found as well.
    ``pooling``: the average of the patch tokens, or the class token. ``precision`` is what features are kept
    as. ``features`` is the folder for them and ``out`` the file of results; both are beside the encoder if
    ``null``.
    """

    encoder: str = MISSING
    model: str | None = None
    image_size: int | None = None
    data: ProbeDataRecipe = field(default_factory=ProbeDataRecipe)
    pooling: Literal["average", "class"] = "average"
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    knn: KnnRecipe = field(default_factory=KnnRecipe)
    logistic: LogisticRecipe = field(default_factory=LogisticRecipe)
    mae: MaeProbeRecipe = field(default_factory=MaeProbeRecipe)
    precision: Literal["float16", "float32"] = "float32"
    device: Literal["cpu", "gpu", "mps"] | None = None
    features: str | None = None
    out: str | None = None


def load_probe(path: str | Path | None, overrides: Sequence[str] = ()) -> ProbeRecipe:
    """Read a probe's recipe, and what it leaves open from the ``recipe.yaml`` beside the encoder.

    Args:
        path: YAML file; ``None``: the overrides say all.
        overrides: ``key=value`` each.

    Returns:
        The recipe, with images to probe on and their size.

    Raises:
        RecipeError: If a key or a value is wrong, or it is nowhere said what to probe on; one line.
    """
    return load_onto(ProbeRecipe, path, overrides, check=_complete)


def probe_settings(recipe: ProbeRecipe) -> ProbeSettings:
    """How a recipe wants features probed.

    Raises:
        RecipeError: If a setting cannot work; one line.
    """
    knn, logistic = recipe.knn, recipe.logistic
    for key, value, works, expected in (
        ("knn.k", knn.k, knn.k >= 1, "at least 1"),
        ("knn.temperature", knn.temperature, knn.temperature > 0, "above 0"),
        ("logistic.weight_decay", logistic.weight_decay, logistic.weight_decay > 0, "above 0"),
    ):
        if not works:
            raise RecipeError(f"{key}={value}: expected {expected}")
    try:
        mae = MaeProbe(**asdict(recipe.mae))
    except ValueError as error:
        raise RecipeError(f"mae.{error}") from error
    return ProbeSettings(k=knn.k, temperature=knn.temperature, weight_decay=logistic.weight_decay, mae=mae)


def _complete(recipe: ProbeRecipe) -> None:
    """Fill in what the recipe leaves to that of the encoder, and refuse what cannot work."""
    encoder, data = Path(recipe.encoder), recipe.data
    if not encoder.is_file():
        raise RecipeError(f"encoder={encoder}: no such file; expected the encoder.pt of a run")
    beside = _beside(encoder)
    theirs = beside.get("data") or {}
    given = data.source is not None
    if data.source is None:  # the halves belong together
        data.source, data.test_source = theirs.get("source"), data.test_source or theirs.get("test_source")
        data.resize = data.resize or theirs.get("resize")
    data.cache = data.cache or theirs.get("cache") or DataRecipe.cache
    data.mean = data.mean or tuple(theirs.get("mean") or DataRecipe.mean)
    data.std = data.std or tuple(theirs.get("std") or DataRecipe.std)
    recipe.image_size = recipe.image_size or (beside.get("model") or {}).get("image_size")
    if recipe.image_size is None:
        raise RecipeError("image_size: expected the side of the images, in pixels: no recipe.yaml tells it")
    _check_sources(data, given=given)
    if unknown := [name for name in recipe.methods if name not in METHODS] or not recipe.methods:
        name = unknown[0] if isinstance(unknown, list) else "[]"
        raise RecipeError(f"methods={name}: {known_names(name, METHODS)}")
    probe_settings(recipe)


def _check_sources(data: ProbeDataRecipe, *, given: bool) -> None:
    """Both halves are named and there; ``given``: the training images are not those of the encoder's run."""
    if data.source is None or not (data.test_source or data.source == PHOTOS):
        key = "data.source" if data.source is None else "data.test_source"
        why = (
            f"none goes with data.source={data.source}"
            if given
            else "the recipe.yaml beside the encoder names none"
        )
        raise RecipeError(f"{key}: expected labelled images: {why}")
    for key, source in (("data.source", data.source), ("data.test_source", data.test_source)):
        if source and (is_remote(source) or (source != PHOTOS and not Path(source).exists())):
            raise RecipeError(
                f"{key}={source}: expected {PHOTOS}, an image folder, a tar of one, or MDS shards"
            )


def _beside(encoder: Path) -> dict[str, Any]:
    path = encoder.parent / "recipe.yaml"
    return recipe_values(path) if path.is_file() else {}
