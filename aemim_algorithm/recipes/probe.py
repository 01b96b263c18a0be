"""``aemim probe``: score a frozen encoder; its features are computed once and kept beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from aemim_algorithm.data.index import read_index
from aemim_algorithm.environment import environment, write_json
from aemim_algorithm.evaluation.feature_cache import (
    Split,
    cached_split,
    digest_of,
    file_digest,
    shards_digest,
    structure_digest,
)
from aemim_algorithm.evaluation.frozen import encode, relabelled, training_labels
from aemim_algorithm.evaluation.probe import probe
from aemim_algorithm.exchange.architecture import architecture
from aemim_algorithm.exchange.files import read_encoder, require_fit
from aemim_algorithm.recipes.datasets import shards_of
from aemim_algorithm.recipes.layers import RecipeError
from aemim_algorithm.recipes.probe_schema import ProbeRecipe, probe_settings
from aemim_algorithm.recipes.schema import DataRecipe

__all__ = ["ProbeOutputs", "run_probe"]

RESULTS = "probe.json"
_BATCH = 128  # images of one forward


@dataclass(frozen=True)
class ProbeOutputs:
    """What a probe found.

    Attributes:
        results: Rows of :func:`~aemim_algorithm.evaluation.probe.probe`.
        out: File that holds them.
        cached: Whether all features were on the disk already.
        seconds: Wall-clock of features and probes.
    """

    results: list[dict[str, Any]]
    out: Path
    cached: bool
    seconds: float


def run_probe(recipe: ProbeRecipe, *, command: Sequence[str] = ("aemim", "probe")) -> ProbeOutputs:
    """Score an encoder and write the results as JSON.

    Args:
        recipe: What :func:`load_probe` returned.
        command: For the results.

    Returns:
        What was found and where it stands.

    Raises:
        RecipeError: If the architecture is unknown, a setting cannot work or there is no such device.
        ConversionError: If the data cannot be converted.
        ValueError: If the encoder does not fit its architecture or the data, or the test images are of
            other classes.
        OSError: If something cannot be written.
    """
    start = time.perf_counter()
    settings, encoder, device = probe_settings(recipe), _encoder(recipe), _device(recipe)
    folders = {half: _shards(recipe, half) for half in ("train", "test")}
    _require_neighbours(recipe, folders["train"])
    labels = training_labels(folders["train"], folders["test"])
    (train, kept), (test, kept_test) = (
        _features(recipe, encoder, device, half, folder) for half, folder in folders.items()
    )
    test = Split(test.features, relabelled(test.labels, labels))  # what is kept has the labels of its shards
    rows = probe(train, test, methods=cast(Any, recipe.methods), settings=settings)
    out = Path(recipe.out) if recipe.out else Path(recipe.encoder).parent / RESULTS
    seconds = round(time.perf_counter() - start, 2)
    outputs = ProbeOutputs(results=rows, out=out, cached=kept and kept_test, seconds=seconds)
    training = {"n_train": len(train.labels), "dim": train.features.shape[1]}
    about = {"settings": asdict(recipe), "seconds": seconds, "features_were_kept": outputs.cached}
    write_json({"results": rows} | training | about | environment(command), out)
    return outputs


def _encoder(recipe: ProbeRecipe) -> nn.Module:
    path = Path(recipe.encoder)
    like = architecture(recipe.model, path)
    if like is None:
        raise RecipeError(f"encoder={path}: no recipe.yaml beside it: name its architecture as model=…")
    state = read_encoder(path)
    encoder = cast(nn.Module, like.encoder)
    if "mask_token" in encoder.state_dict():  # what the export has dropped, and no probe needs
        state = {"mask_token": encoder.state_dict()["mask_token"]} | state
    require_fit(encoder, state, whose=f"the encoder in {path}")
    encoder.load_state_dict(state)
    return encoder


def _device(recipe: ProbeRecipe) -> torch.device:
    there = {"cpu": True, "gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = recipe.device or ("gpu" if there["gpu"] else "cpu")
    if not there[name]:
        raise RecipeError(f"device={name}: this machine has none; expected cpu")
    return torch.device("cuda" if name == "gpu" else name)


def _require_neighbours(recipe: ProbeRecipe, folder: Path) -> None:
    count = sum(shard["samples"] for shard in read_index(folder))
    if "knn" in recipe.methods and recipe.knn.k > count:
        raise RecipeError(f"knn.k={recipe.knn.k}: expected at most {count}, the training images")


def _features(
    recipe: ProbeRecipe, encoder: nn.Module, device: torch.device, half: str, shards: Path
) -> tuple[Split, bool]:
    data, path = recipe.data, Path(recipe.encoder)
    view: dict[str, Any] = {
        "image_size": recipe.image_size,
        "mean": data.mean,
        "std": data.std,
        "pooling": recipe.pooling,
    }

    def compute() -> Split:
        options = view | {"device": device, "batch_size": _BATCH, "workers": data.workers}
        features, labels = encode({"encoder": encoder.to(device)}, shards, **options)
        return Split(features["encoder"], labels)

    key = digest_of(
        file_digest(path),
        structure_digest(encoder),
        shards_digest(shards),
        sorted(view.items()),
        recipe.precision,
    )
    folder = Path(recipe.features) if recipe.features else path.parent / "features"
    return cached_split(folder, half, key, compute, dtype=getattr(torch, recipe.precision))


def _shards(recipe: ProbeRecipe, half: str) -> Path:
    data = recipe.data
    source = data.source if half == "train" else data.test_source or data.source
    wanted = DataRecipe(
        source=str(source),
        cache=str(data.cache),
        resize=data.resize,
        skip_broken=data.skip_broken,
        crop_scale=(1.0, 1.0),
    )
    return shards_of(str(source), wanted, split=half)
