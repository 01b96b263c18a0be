"""A ViT as a detector's backbone: its features are the encoder's, its windows and its pyramid are right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_detectors import architecture, tiny_backbone
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from aemim_algorithm.detection.backbone import ViTBackbone, build_encoder, load_encoder
from aemim_algorithm.detection.pyramid import LEVELS, POOLED, SimplePyramid, level_strides
from aemim_algorithm.detection.windows import Windows, global_positions
from aemim_algorithm.models.attention import Attention
from aemim_algorithm.models.classifier import architecture_of
from aemim_algorithm.models.vit import MaskedViT


def pictures(*size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(3))


def as_map(tokens: Tensor, rows: int, columns: int) -> Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), -1, rows, columns)


def test_features_are_those_of_the_encoder_that_was_pretrained() -> None:
    torch.manual_seed(1)
    encoder = MaskedViT(image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2).eval()
    backbone = ViTBackbone(build_encoder(architecture_of(encoder)), window=None, channels=16).eval()
    load_encoder(backbone, encoder.state_dict(), whose="it")
    assert [type(block.attn) for block in backbone.encoder.blocks] == [Attention, Attention]
    with torch.no_grad():
        expected = as_map(encoder(pictures(32, 32))[:, 1:], 4, 4)
        torch.testing.assert_close(backbone.features(pictures(32, 32)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 8], ids=["everything", "one window for all"])
@pytest.mark.parametrize("size", [(32, 32), (48, 32), (40, 64)])
def test_features_of_any_size_are_bitwise_timms(size: tuple[int, int], window: int | None) -> None:
    backbone = tiny_backbone(window=window, global_blocks=0)
    grid = (size[0] // 8, size[1] // 8)
    kwargs = architecture()["kwargs"] | {"img_size": list(size)}
    plain = build_encoder({"name": "vit_base_patch16_224", "kwargs": kwargs}).eval()
    state = backbone.encoder.state_dict()
    position = resample_abs_pos_embed(state["pos_embed"], new_size=list(grid), old_size=[4, 4])
    plain.load_state_dict(state | {"pos_embed": position})
    # timm's own blocks again, in the order in which timm runs them.
    with torch.no_grad():
        tokens = plain.forward_features(pictures(*size))
        assert torch.equal(backbone.features(pictures(*size)), as_map(tokens[:, 1:], *grid))


def test_an_encoder_of_other_sizes_is_refused() -> None:
    other = build_encoder(architecture(depth=1)).state_dict()
    with pytest.raises(ValueError, match=r"the encoder x does not fit .*blocks\.1"):
        load_encoder(tiny_backbone(), other, whose="the encoder x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 6, "img_size": [36, 36]}, "patches of 6x6 pixels; expected a power of two"),
        ({"patch_size": 2, "img_size": [16, 16]}, "at least 4"),
    ],
)
def test_patches_of_which_no_pyramid_can_be_made_are_refused(change: dict[str, Any], message: str) -> None:
    kwargs = architecture()["kwargs"] | change
    with pytest.raises(ValueError, match=message):
        ViTBackbone(build_encoder({"name": "vit_base_patch16_224", "kwargs": kwargs}))


def test_a_swin_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a plain ViT"):
        build_encoder({"name": "swin_tiny_patch4_window7_224", "kwargs": {}})


def test_global_blocks_are_evenly_spread() -> None:
    assert global_positions(12, 4) == {2, 5, 8, 11}
    assert global_positions(24, 4) == {5, 11, 17, 23}
    assert global_positions(2, 4) == {0, 1}
    assert global_positions(2, 1) == {1}
    assert global_positions(12, 0) == set()


@pytest.mark.parametrize(
    ("grid", "size", "shape", "counts"),
    [
        ((50, 84), 14, (13, 14), (4, 6)),
        ((7, 5), 3, (3, 3), (3, 2)),
        ((4, 4), 2, (2, 2), (2, 2)),
        ((1, 9), 4, (1, 3), (1, 3)),
        ((5, 3), 7, (5, 3), (1, 1)),
    ],
)
def test_windows_are_few_equal_and_none_is_empty(
    grid: tuple[int, int], size: int, shape: tuple[int, int], counts: tuple[int, int]
) -> None:
    windows = Windows.at_most(size, grid)
    assert (windows.shape, windows.counts) == (shape, counts)
    assert all(missing < part for missing, part in zip(windows.missing, shape, strict=True))
    patches = torch.arange(2.0 * grid[0] * grid[1] * 3).reshape(2, grid[0] * grid[1], 3)
    parts = windows.cut(patches)
    assert parts.shape == (2 * math.prod(counts), math.prod(shape), 3)
    assert torch.equal(windows.join(parts), patches)
    first = patches.reshape(2, *grid, 3)[0, : shape[0], : shape[1]].reshape(-1, 3)
    assert torch.equal(parts[0], first)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)], ids=["no padding", "padded"])
def test_a_windowed_block_is_attention_among_the_patches_of_a_window(grid: tuple[int, int]) -> None:
    """Oracle: attention to everything under a mask that allows what shares a window, the class token alone."""
    backbone = tiny_backbone(window=2, global_blocks=0)
    block = backbone.encoder.blocks[0]
    windows = Windows.at_most(2, grid)
    row, column = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    owner = ((row // windows.shape[0]) * windows.counts[1] + column // windows.shape[1]).flatten()
    tokens = torch.randn(2, 1 + len(owner), 32, generator=torch.Generator().manual_seed(0))
    together = torch.nn.functional.pad(owner[:, None] == owner[None], (1, 0), value=True)
    mask = torch.zeros(together.shape).masked_fill(~together, -torch.inf)
    qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    scores = qkv[0, :, :, 1:] @ qkv[1].transpose(-2, -1) / 4 + mask
    attended = block.attn.proj((scores.softmax(-1) @ qkv[2]).transpose(1, 2).flatten(2))
    with torch.no_grad():
        found = block._attend(block.norm1(tokens), grid)
    torch.testing.assert_close(found[:, 1:], attended.detach(), rtol=1e-5, atol=1e-5)


def test_the_class_token_gathers_the_mean_of_the_windows() -> None:
    backbone = tiny_backbone(window=2, global_blocks=0)
    block = backbone.encoder.blocks[0]
    tokens = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))  # a grid of 2 x 4
    with torch.no_grad():
        whole = block._attend(tokens, (2, 4))[:, 0]
        left, right = (
            block.attn(
                torch.cat([tokens[:, :1], tokens[:, 1:].unflatten(1, (2, 4))[:, :, part].flatten(1, 2)], 1)
            )
            for part in (slice(0, 2), slice(2, 4))
        )
    torch.testing.assert_close(whole, (left[:, 0] + right[:, 0]) / 2)


@pytest.mark.parametrize("size", [(64, 64), (41, 70), (16, 33), (17, 16)])
def test_maps_cover_odd_sizes_at_their_strides(size: tuple[int, int]) -> None:
    backbone = tiny_backbone(window=3)
    assert backbone.strides == (2, 4, 8, 16, 32)
    with torch.no_grad():
        maps = backbone(pictures(*size))
    padded = [math.ceil(side / 16) * 16 for side in size]
    assert list(maps) == [*LEVELS, POOLED]
    for stride, found in zip(backbone.strides, maps.values(), strict=True):
        assert found.shape == (2, 16, *(math.ceil(side / stride) for side in padded))


def test_padding_is_zeros_at_the_right_and_below() -> None:
    backbone = tiny_backbone(window=3)
    small = pictures(41, 30)
    padded = torch.zeros(2, 3, 48, 32)
    padded[:, :, :41, :30] = small
    with torch.no_grad():
        for name, found in backbone(small).items():
            assert torch.equal(found, backbone(padded)[name])


def test_patches_of_16_pixels_give_the_strides_of_the_paper() -> None:
    assert level_strides(16) == (4, 8, 16, 32, 64)


def test_a_map_sees_its_own_place() -> None:
    """A feature at one cell alone reaches the same place of each map, and no further than the kernels."""
    pyramid = SimplePyramid(16, 8).eval()
    blank = torch.zeros(1, 16, 8, 8)
    features = blank.clone()
    features[0, :, 2, 5] = torch.randn(16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for scale, found, before in zip(
            (4, 2, 1, 0.5), pyramid(features).values(), pyramid(blank).values(), strict=False
        ):
            rows, columns = (found - before).abs().sum(1)[0].nonzero().T
            for cells, place in ((rows, 2), (columns, 5)):
                first, last = math.floor(place * scale), math.ceil((place + 1) * scale) - 1
                assert int(cells.min()) >= first - 1
                assert int(cells.max()) <= last + 1
                assert int(cells.min()) <= first <= last <= int(cells.max())


@pytest.mark.parametrize("window", [None, 3])
def test_recomputing_blocks_changes_no_gradient(window: int | None) -> None:
    gradients = []
    for recompute in (False, True):
        backbone = tiny_backbone(window=window, global_blocks=1, recompute=recompute, drop_path=0.5).train()
        torch.manual_seed(5)
        sum(found.square().sum() for found in backbone(pictures(40, 32)).values()).backward()  # type: ignore[union-attr]
        gradients.append({name: value.grad for name, value in backbone.named_parameters()})
    assert all(value is not None for value in gradients[0].values())
    for name, value in gradients[0].items():
        assert torch.equal(value, gradients[1][name]), name  # type: ignore[arg-type]


def test_a_frozen_encoder_stays_as_it_is() -> None:
    backbone = tiny_backbone(frozen=True, drop_path=0.9).train()
    assert backbone.pyramid.training
    assert not backbone.encoder.training
    sum(found.sum() for found in backbone(pictures(32, 32)).values()).backward()  # type: ignore[union-attr]
    assert all(value.grad is None for value in backbone.encoder.parameters())
    assert all(value.grad is not None for value in backbone.pyramid.parameters())
