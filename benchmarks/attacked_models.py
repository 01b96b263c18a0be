"""The models that `attack_strength.py` attacks, and the images."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from aemim_algorithm import AEMIM
from aemim_algorithm.evaluation.image_sets import open_images
from aemim_algorithm.exchange.files import read_weights
from aemim_algorithm.models import MAE, MODELS
from aemim_algorithm.recipes.datasets import test_shards
from aemim_algorithm.recipes.pretrain import pretrain
from aemim_algorithm.recipes.schema import Recipe, RecipeError, load_recipe

__all__ = ["load_images", "quickstart", "recipe_of", "test_images", "trained_model"]

QUICKSTART = Path(__file__).parents[1] / "yamls" / "quickstart.yaml"


def quickstart(runs: Path) -> Path:
    """Checkpoint of the quickstart's run in a folder, with 12 blocks: started, continued or found there.

    Args:
        runs: Where it is, and what it makes of the embedded photographs.
    """
    folder = runs / "attack_strength"
    overrides = [
        "model.depth=12",
        "evaluate=false",
        f"save_folder={folder}",
        f"data.cache={runs / 'data_cache'}",
    ]
    return pretrain(load_recipe(QUICKSTART, overrides)).checkpoint


def recipe_of(checkpoint: Path) -> Recipe:
    """The recipe beside a checkpoint.

    Raises:
        ValueError: If there is none.
    """
    path = checkpoint.parent / "recipe.yaml"
    try:
        return load_recipe(path)
    except RecipeError as error:
        raise ValueError(f"{checkpoint} has no recipe beside it, which tells the model: {error}") from error


def test_images(recipe: Recipe) -> Path:
    """The test images of a recipe.

    Raises:
        ValueError: If it names none.
    """
    found = test_shards(recipe.data)
    if found is None:
        raise ValueError("the recipe of the checkpoint names no test images: give --images")
    return found


def trained_model(checkpoint: Path, recipe: Recipe, device: str) -> MAE:
    """The model of a run, in training mode; without adapters in the checkpoint they equal the clean norms.

    Raises:
        ValueError: If it is no MAE, or the file does not hold it.
    """
    options = {str(key): value for key, value in recipe.model.items()}
    name = options.pop("name")
    if not name.startswith("mae_"):
        raise ValueError(f"{checkpoint} is of {name}: expected a run of a mae_ model")
    model = MODELS[name](**options)
    assert isinstance(model, MAE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*trained without it")
        AEMIM().attach(model)
        try:
            model.load_state_dict(read_weights(checkpoint, trust=True))
        except RuntimeError as error:
            raise ValueError(
                f"{checkpoint} is no checkpoint of the {name} in {checkpoint.parent}/recipe.yaml: expected "
                "one with encoder and decoder, such as latest-rank0.pt"
            ) from error
    return model.to(device).train()


def load_images(source: Path, model: MAE, recipe: Recipe, *, count: int, seed: int) -> Tensor:
    """Images that a seed chooses, cropped in the middle and normalised."""
    height, width = model.encoder.patch_embed.img_size
    if height != width:
        raise ValueError(f"the model takes {height}×{width} pixels: expected a square")
    found = open_images(source, image_size=height, already_sized=True, unlabelled=True)
    if len(found) < count:
        raise ValueError(f"{source} has {len(found)} images, expected {count}: lower --batch or --batches")
    chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]
    pixels = torch.stack([found[index][0] for index in chosen.tolist()]) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.data.mean, recipe.data.std))
    return (pixels - mean) / std
