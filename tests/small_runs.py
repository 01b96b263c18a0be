"""Pre-training that takes a second: a recipe, and the images that it trains on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.io import write_png

from aemim_algorithm.callbacks import FiniteCheck
from aemim_algorithm.recipes.schema import Recipe, load_recipe

__all__ = ["RECIPE", "killed_at", "recipe_in", "write_images"]

RECIPE = """
model:
  name: mae_vit_tiny_patch4
  image_size: 16
  embed_dim: 32
  depth: 1
  num_heads: 2
  decoder_dim: 16
  decoder_depth: 1
  decoder_heads: 2
data: {crop_scale: [0.5, 1.0], workers: 0}
algorithms: {aemim: , gradient_clipping: {clipping_type: norm, clipping_threshold: 1.0}}
optimizer: {base_learning_rate: 0.01, weight_decay: 0.05, betas: [0.9, 0.95]}
schedule: {warmup: 2ba, min_learning_rate: 0.0}
max_duration: 2ep
global_batch_size: 8
device: cpu
"""


def write_images(folder: Path, *, per_class: int) -> None:
    """An image folder of noise in two classes, dark and bright."""
    generator = torch.Generator().manual_seed(0)
    for label in (0, 1):
        (folder / str(label)).mkdir(parents=True)
        for number in range(per_class):
            noise = torch.randint(0, 128, (3, 20, 20), generator=generator)
            write_png((noise + 127 * label).byte(), str(folder / str(label) / f"{number}.png"))


def recipe_in(folder: Path, images: Path, *overrides: str) -> Recipe:
    """The recipe, with all that it reads and writes below two folders."""
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    places = [
        f"data.source={images / 'train'}",
        f"data.cache={images / 'cache'}",
        f"save_folder={folder / 'run'}",
    ]
    return load_recipe(path, [*places, *overrides])


class _KilledError(Exception):
    pass


@contextmanager
def killed_at(batch: int) -> Iterator[None]:
    """A run of any recipe ends in here, after so many batches and before a checkpoint of the last one."""

    def kill(self: FiniteCheck, state: Any, logger: Any) -> None:
        if state.timestamp.batch == batch:
            raise _KilledError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_KilledError):
        patch.setattr(FiniteCheck, "after_train_batch", kill)
        yield
