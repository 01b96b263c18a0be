"""Encoders with a mask token: timm's own features, and what hidden patches may not reveal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from aemim_algorithm.models.mask_token import MaskTokenSwin, MaskTokenViT
from aemim_algorithm.models.masking import upsample_mask

Encoder = MaskTokenViT | MaskTokenSwin

VIT: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN: dict[str, Any] = {
    "patch_size": 2,
    "window_size": 2,
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (2, 4),
}
IMAGE = (16, 24)  # not square: an exchange of rows and columns would show
KINDS = ["vit", "swin"]


def build(kind: str, **overrides: Any) -> Encoder:
    """A tiny encoder for 16×24 images whose features cover 4×4 pixels, all parameters perturbed."""
    torch.manual_seed(0)
    encoder: Encoder = (
        MaskTokenViT(image_size=IMAGE, **(VIT | overrides))
        if kind == "vit"
        else MaskTokenSwin(image_size=IMAGE, **(SWIN | overrides))
    )
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder.eval()


def plain(kind: str, encoder: Encoder) -> nn.Module:
    """A stock timm model with the encoder's parameters."""
    options: dict[str, Any] = {"img_size": IMAGE, "num_classes": 0, "global_pool": ""}
    model: nn.Module = (
        VisionTransformer(**VIT, **options) if kind == "vit" else SwinTransformer(**SWIN, **options)
    )
    state = {key: value for key, value in encoder.state_dict().items() if key != "mask_token"}
    model.load_state_dict(state, strict=True)
    return model.eval()


def pixels(mask: Tensor) -> Tensor:
    """A mask of 4×4-pixel patches at every pixel, shape (batch, 1, 16, 24)."""
    grid = mask.view(-1, 4, 6)
    return grid.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, *IMAGE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask() -> Tensor:
    return torch.rand(3, 24, generator=torch.Generator().manual_seed(2)) < 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_mask_it_is_timms(kind: str, images: Tensor) -> None:
    encoder = build(kind)
    expected = plain(kind, encoder)(images)
    found = encoder(images)
    assert found.shape == ((3, 25, 24) if kind == "vit" else (3, 24, 16))
    assert torch.equal(found, expected if kind == "vit" else expected.reshape(3, 24, 16))
    assert (encoder.grid, encoder.patch_size) == ((4, 6), 4)
    assert found.shape[1] == encoder.num_prefix_tokens + 24


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_mask_it_is_timms_on_replaced_embeddings(kind: str, images: Tensor, mask: Tensor) -> None:
    encoder = build(kind)
    stock: Any = plain(kind, encoder)

    def replace(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        replaced = output.clone()
        for sample, row, column in ((i, r, c) for i in range(3) for r in range(4) for c in range(6)):
            if mask[sample, 6 * row + column]:
                if kind == "vit":
                    replaced[sample, 6 * row + column] = encoder.mask_token[0, 0]
                else:  # a mask patch covers 2×2 patches of the first stage
                    replaced[sample, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = encoder.mask_token[
                        0, 0
                    ]
        return replaced

    stock.patch_embed.register_forward_hook(replace)
    assert torch.allclose(
        encoder(images, mask), stock(images).reshape(3, -1, encoder.num_features), atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_pixels_do_not_reach_the_features(kind: str, images: Tensor, mask: Tensor) -> None:
    encoder = build(kind)
    features = encoder(images, mask)
    other = torch.where(pixels(mask), torch.randn_like(images), images)
    assert torch.equal(encoder(other, mask), features)
    seen = torch.where(pixels(mask), images, torch.randn_like(images))
    assert not torch.allclose(encoder(seen, mask), features, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_the_token_and_visible_pixels_only(kind: str, images: Tensor, mask: Tensor) -> None:
    encoder = build(kind)
    images.requires_grad_()
    encoder(images, mask).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())
    assert images.grad is not None
    assert torch.equal(images.grad.any(dim=1, keepdim=True), ~pixels(mask))


def test_a_coarse_mask_covers_blocks() -> None:
    mask = torch.tensor([[True, False, False, False, True, True]])
    fine = upsample_mask(mask, (2, 3), 2).view(4, 6).int().tolist()
    assert fine == [[1, 1, 0, 0, 0, 0]] * 2 + [[0, 0, 1, 1, 1, 1]] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_position_tables_are_not_decayed(kind: str) -> None:
    names = build(kind).no_weight_decay()
    assert "mask_token" in names
    if kind == "vit":
        assert {"pos_embed", "cls_token"} <= names
    else:
        assert {name.rpartition(".")[2] for name in names} == {"mask_token", "relative_position_bias_table"}
        assert len(names) == 1 + 4


def test_starts_as_published() -> None:
    """Truncated normals of deviation 0.02; residual outputs divided by sqrt(2 · depth of the layer)."""
    torch.manual_seed(0)
    vit = MaskTokenViT(image_size=32, patch_size=4, embed_dim=96, depth=3, num_heads=2)
    for name in (
        "mask_token",
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.2.attn.qkv.weight",
    ):
        assert vit.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.25), name
    for layer, block in enumerate(vit.blocks):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(0.02 / (2 * (layer + 1)) ** 0.5, rel=0.05)
    assert not vit.patch_embed.proj.bias.any()
    even = MaskTokenViT(
        image_size=32, patch_size=4, embed_dim=96, depth=3, num_heads=2, depth_scaled_init=False
    )
    for block in even.blocks:
        assert block.mlp.fc2.weight.std().item() == pytest.approx(0.02, rel=0.05)
    swin = MaskTokenSwin(image_size=IMAGE, **(SWIN | {"embed_dim": 64}))
    for name in ("mask_token", "layers.0.blocks.0.attn.qkv.weight"):
        assert swin.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.25), name


def test_stochastic_depth_drops_branches_in_training_only(images: Tensor) -> None:
    encoder = build("vit", drop_path=0.9)
    assert torch.equal(encoder(images), encoder(images))
    encoder.train()
    assert not torch.equal(encoder(images), encoder(images))


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused(kind: str, images: Tensor) -> None:
    encoder = build(kind)
    with pytest.raises(
        ValueError, match=r"images are \(16, 16\) pixels, the encoder was built for \(16, 24\)"
    ):
        encoder(images[..., :16])
    with pytest.raises(ValueError, match=r"mask has shape \(3, 96\), expected \(3, 24\)"):
        encoder(images, torch.ones(3, 96, dtype=torch.bool))


def test_a_swin_that_would_be_padded_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size=18 is not a multiple of 4"):
        MaskTokenSwin(image_size=18, **SWIN)
    with pytest.raises(
        ValueError, match="window_size=3 does not divide the 8 patches along a side of stage 1"
    ):
        MaskTokenSwin(image_size=16, **(SWIN | {"window_size": 3}))
