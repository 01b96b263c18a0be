"""Export at another input size: what timm itself makes of the checkpoint, square or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_mae
from test_export import plain, small_simmim, trained_looking
from timm.models import swin_transformer, vision_transformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from aemim_algorithm.export import export_encoder

Size = tuple[int, int]


def by_hand(position: Tensor, old: Size, new: Size) -> Tensor:
    """The class token's slot as it is, the others as a picture with ``dim`` channels, bicubic."""
    dim = position.shape[-1]
    table = position[0, 1:].T.reshape(1, dim, *old)
    resampled = F.interpolate(table, size=new, mode="bicubic", antialias=True)
    return torch.cat([position[:, :1], resampled.flatten(2).transpose(1, 2)], dim=1)


def vit(size: Size) -> VisionTransformer:
    sizes: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return VisionTransformer(img_size=size, num_classes=0, global_pool="", **sizes)


@pytest.mark.parametrize("old", [(16, 16), (16, 24)])
@pytest.mark.parametrize("new", [(16, 16), (16, 24), (24, 16), (32, 32)])
def test_positions_are_resampled_to_another_size(old: Size, new: Size, tmp_path: Path) -> None:
    model = trained_looking(tiny_mae(image_size=old))
    trained = export_encoder(model, tmp_path / "as_trained.pt")
    exported = export_encoder(model, tmp_path / "encoder.pt", image_size=new)
    timms = vit(new)
    timms.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True), strict=True)

    expected = by_hand(trained["pos_embed"], (old[0] // 4, old[1] // 4), (new[0] // 4, new[1] // 4))
    if old == new:
        expected = trained["pos_embed"]
        assert torch.equal(exported["pos_embed"], expected)
    torch.testing.assert_close(exported["pos_embed"], expected)
    assert torch.equal(exported["pos_embed"][:, 0], trained["pos_embed"][:, 0])
    for name in trained.keys() - {"pos_embed"}:
        assert torch.equal(exported[name], trained[name]), name
    if old == (16, 16):  # timm takes what it cannot know for square
        loaded = vision_transformer.checkpoint_filter_fn(dict(trained), timms)
        assert torch.equal(exported["pos_embed"], loaded["pos_embed"])
    assert model.encoder.patch_embed.img_size == old
    assert torch.equal(model.state_dict()["encoder.pos_embed"], trained["pos_embed"])


def test_one_number_is_a_square(tmp_path: Path) -> None:
    model = tiny_mae()
    square, sides = (export_encoder(model, tmp_path / "e.pt", image_size=size) for size in (24, (24, 24)))
    assert torch.equal(square["pos_embed"], sides["pos_embed"])
    assert square["pos_embed"].shape == (1, 1 + 36, 24)


def test_the_decoder_is_resampled_as_well(tmp_path: Path) -> None:
    model = trained_looking(tiny_mae(image_size=(16, 24)))
    options: dict[str, Any] = {"format": "mae", "decoder": True}
    exported = export_encoder(model, tmp_path / "mae.pth", image_size=(24, 32), **options)
    for ours, theirs in (("encoder.pos_embed", "pos_embed"), ("decoder.pos_embed", "decoder_pos_embed")):
        expected = by_hand(model.state_dict()[ours], (4, 6), (6, 8))
        torch.testing.assert_close(exported[theirs], expected)


@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # timm's own
@pytest.mark.parametrize("new", [(32, 32), (64, 64), (32, 64)])
@pytest.mark.parametrize("window", [4, 2, 7])
def test_tables_of_relative_positions_follow_the_window(new: Size, window: int, tmp_path: Path) -> None:
    model = trained_looking(small_simmim("swin"))
    trained = export_encoder(model, tmp_path / "as_trained.pt")
    exported = export_encoder(model, tmp_path / "encoder.pt", image_size=new, window_size=window)
    timms = plain("swin", img_size=new, window_size=window)
    timms.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True), strict=True)
    for name, value in swin_transformer.checkpoint_filter_fn(dict(trained), timms).items():
        torch.testing.assert_close(exported[name], value, msg=name)
    if (new, window) == ((32, 32), 4):
        assert all(torch.equal(exported[name], trained[name]) for name in trained)
    with torch.no_grad():
        assert timms.forward_features(torch.randn(1, 3, *new)).isfinite().all()


def test_a_window_stays_unless_another_one_is_asked_for(tmp_path: Path) -> None:
    model = trained_looking(small_simmim("swin"))
    trained = export_encoder(model, tmp_path / "as_trained.pt")
    exported = export_encoder(model, tmp_path / "encoder.pt", image_size=64)
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], trained[name]) for name in trained)
    assert model.encoder.patch_embed.img_size == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 18}, r"image_size=18x18; expected multiples of the patch, 4x4 pixels"),
        ({"image_size": (16, 0)}, r"image_size=16x0; expected multiples"),
        ({"window_size": 4}, "window_size=4; expected none, MaskedViT"),
        ({"image_size": 32, "model": tiny_mae(depth=3)}, r"blocks.2.norm1.weight: got nothing, expected \(24,\)"),
        ({"image_size": 32, "model": tiny_mae(embed_dim=16)}, r"got \(1, 1, 24\), expected \(1, 1, 16\)"),
        ({"image_size": 32, "model": torch.nn.Linear(1, 1)}, "got NoneType as the encoder of Linear"),
    ],
)  # fmt: skip
def test_sizes_and_architectures_that_do_not_fit(arguments: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        export_encoder(tiny_mae(), tmp_path / "encoder.pt", **arguments)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [{"image_size": 32}, {"format": "huggingface"}])
def test_parameters_alone_do_not_tell_the_architecture(arguments: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the model's architecture, which a checkpoint does not hold"):
        export_encoder(tiny_mae().state_dict(), tmp_path / "encoder.pt", **arguments)
    export_encoder(tiny_mae().state_dict(), tmp_path / "encoder.pt", model=tiny_mae(seed=1), **arguments)
