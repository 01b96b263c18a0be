"""A recipe that starts from imported weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_same
from small_runs import recipe_in, write_images
from test_export import trained_looking

from aemim_algorithm.adapters import adapters_of
from aemim_algorithm.exchange.importing import import_checkpoint
from aemim_algorithm.export import export_encoder
from aemim_algorithm.models import MAE, MODELS
from aemim_algorithm.recipes.datasets import train_shards
from aemim_algorithm.recipes.preflight import prepare
from aemim_algorithm.recipes.pretrain import build_trainer, pretrain
from aemim_algorithm.recipes.schema import RecipeError, load_recipe, save_recipe

SIZES = {"image_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "images" / "train", per_class=4)
    return tmp_path / "images"


def published(folder: Path, *, decoder: bool) -> MAE:
    """Writes ``start.pt``, and returns the model whose weights it holds."""
    model: MAE = trained_looking(MODELS["mae_vit_tiny_patch4"](**SIZES, **DECODER), "none")
    export_encoder(model, folder / "mae.pth", format="mae", decoder=decoder)
    import_checkpoint(folder / "mae.pth", folder / "start.pt", model=model)
    return model


@pytest.mark.parametrize("decoder", [True, False])
def test_a_run_starts_from_imported_weights(decoder: bool, tmp_path: Path, images: Path) -> None:
    start = published(tmp_path, decoder=decoder).state_dict()
    recipe = recipe_in(tmp_path, images, f"init_from={tmp_path / 'start.pt'}")
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    fresh = prepare(recipe).model().state_dict()
    trainer = build_trainer(recipe, prepare(recipe), train_shards(recipe.data))
    trainer.close()
    model = trainer.state.model
    for name, value in model.state_dict().items():
        if "adversarial" not in name and (decoder or name.startswith("encoder.")):
            assert torch.equal(value, start[name]), name
    if not decoder:
        assert fresh["decoder.head.weight"].shape == start["decoder.head.weight"].shape
        assert not torch.equal(model.state_dict()["decoder.head.weight"], start["decoder.head.weight"])
    adapters = adapters_of(model)
    assert adapters
    for adapter in adapters:
        assert all(torch.equal(clean, copy) for clean, copy in adapter.twins())


def test_a_run_goes_on_without_the_file_that_it_started_from(tmp_path: Path, images: Path) -> None:
    published(tmp_path, decoder=True)
    recipe = recipe_in(tmp_path, images, f"init_from={tmp_path / 'start.pt'}", "max_duration=3ep")
    first = torch.load(pretrain(recipe).encoder, weights_only=True)
    (tmp_path / "start.pt").unlink()
    assert_same(torch.load(pretrain(recipe).encoder, weights_only=True), first)  # finished: as it was
    longer = torch.load(pretrain(replace(recipe, max_duration="4ep")).encoder, weights_only=True)
    assert not torch.equal(longer["norm.weight"], first["norm.weight"])
    with pytest.raises(RecipeError, match="no such file"):
        prepare(replace(recipe, save_folder=str(tmp_path / "other")))


def test_weights_that_do_not_fit_are_refused_before_data_is_read(tmp_path: Path, images: Path) -> None:
    published(tmp_path, decoder=True)
    overrides = {
        "model.depth=2": r"model: cannot start from .*start.pt: .* blocks.1.norm1.weight: got nothing",
        "init_from=gone.pt": "model: cannot start from gone.pt: .*no such file",
    }
    for override, message in overrides.items():
        with pytest.raises(RecipeError, match=message):
            prepare(recipe_in(tmp_path, images, f"init_from={tmp_path / 'start.pt'}", override))
    assert not (images / "cache").exists()
