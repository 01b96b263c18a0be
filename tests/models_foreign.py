"""Masked-image models as other people write them: nothing here knows of AEMIM.

A monolith in the manner of the original MAE code, whose encoder is a method, and convolutional models
full of normalization layers, whose encoder goes by many names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from composer.models import ComposerModel
from timm.layers import LayerNorm2d, RmsNorm2d
from timm.models.convnext import ConvNeXtBlock
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "ConvolutionalMIM",
    "MonolithicMIM",
    "SwinMIM",
    "ViTMIM",
    "conv_mim",
    "grn_mim",
    "monolith",
    "swin_mim",
    "vit_mim",
]

Norm = Callable[[int], nn.Module]


class Monolith(nn.Module):
    """A masked autoencoder in one module; the encoder is its method ``forward_encoder``."""

    def __init__(self, *, patch_size: int = 4, patches: int = 16, dim: int = 16) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patch_embed = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, patches + 1, dim) * 0.2)
        self.blocks = nn.ModuleList([Block(dim, 2, qkv_bias=True, proj_drop=0.1) for _ in range(2)])
        self.norm = nn.LayerNorm(dim)
        self.decoder_embed = nn.Linear(dim, dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, patches + 1, dim) * 0.2)
        self.decoder_block = Block(dim, 2, qkv_bias=True)
        self.decoder_norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, 3 * patch_size**2)

    def forward_encoder(self, imgs: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """Latent of the visible patches and the class token, mask (1 is hidden), order to restore."""
        tokens = self.patch_embed(imgs).flatten(2).mT + self.pos_embed[:, 1:]
        batch, patches, dim = tokens.shape
        order = torch.rand(batch, patches, device=imgs.device).argsort(dim=1)
        restore = order.argsort(dim=1)
        visible = order[:, : int(patches * (1 - mask_ratio)), None]
        mask = (restore >= visible.shape[1]).float()
        first = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        tokens = torch.cat([first, tokens.gather(1, visible.expand(-1, -1, dim))], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens), mask, restore

    def forward_decoder(self, latent: Tensor, restore: Tensor) -> Tensor:
        """Pixels of every patch."""
        tokens = self.decoder_embed(latent)
        hidden = self.mask_token.expand(len(tokens), restore.shape[1] + 1 - tokens.shape[1], -1)
        patches = torch.cat([tokens[:, 1:], hidden], dim=1)
        patches = patches.gather(1, restore[:, :, None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + self.decoder_pos_embed
        return self.decoder_pred(self.decoder_norm(self.decoder_block(tokens)))[:, 1:]

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error of the hidden patches."""
        target = F.unfold(imgs, self.patch_size, stride=self.patch_size).mT
        return ((pred - target).square().mean(dim=-1) * mask).sum() / mask.sum()

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, prediction, mask."""
        latent, mask, restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, restore)
        return self.forward_loss(imgs, pred, mask), pred, mask


class MonolithicMIM(ComposerModel):
    """The wrapper that a Composer user writes around such code."""

    def __init__(self, model: Monolith) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.model(batch[0])

    def loss(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        return outputs[0]


class MaskedConvNet(nn.Module):
    """Patch embedding, mask token, then whatever follows; the mask is drawn here unless it is given."""

    def __init__(self, dim: int, *layers: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, stride=4)
        self.mask_token = nn.Parameter(torch.randn(1, dim, 1, 1) * 0.1)
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = self.stem(images)
        if mask is None:
            mask = torch.rand(len(tokens), tokens[0, 0].numel(), device=tokens.device) < 0.6
        hidden = mask.view(len(mask), 1, *tokens.shape[2:])
        return self.layers(torch.where(hidden, self.mask_token, tokens))


class ConvolutionalMIM(ComposerModel):
    """Reconstructs whole images from a convolutional encoder that hangs under any name.

    Batches are ``(images, mask)``. Where the second entry is no mask, one is drawn in ``forward``, or
    by the encoder itself with ``own_mask``.
    """

    def __init__(self, name: str, net: nn.Module, head: nn.Module, *, own_mask: bool = False) -> None:
        super().__init__()
        self.add_module(name, net)
        self.head, self.own_mask, self._name = head, own_mask, name

    def forward(self, batch: Any) -> Tensor:
        images, mask = batch
        if mask.dtype != torch.bool:
            mask = None if self.own_mask else torch.rand(len(images), 16) < 0.6
        return self.head(self.get_submodule(self._name)(images, mask))

    def loss(self, outputs: Tensor, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        return (outputs - batch[0]).abs().mean()


class SwinMIM(ComposerModel):
    """timm's Swin as it is, fed with images whose hidden patches are blank; features are NHWC."""

    def __init__(self, backbone: SwinTransformer, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = _head(dim, nn.BatchNorm2d, stride=4)

    def forward(self, batch: Any) -> Tensor:
        images, mask = batch
        hidden = mask.view(-1, 1, 4, 4).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        return self.head(self.backbone(images.masked_fill(hidden, 0.0)).permute(0, 3, 1, 2))

    def loss(self, outputs: Tensor, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        return (outputs - batch[0]).abs().mean()


class ViTMIM(ComposerModel):
    """timm's ViT as it is, called by ``forward_features`` as its users do, on images with blank patches."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.embed_dim, 48)

    def forward(self, batch: Any) -> Tensor:
        images, mask = batch
        hidden = mask.view(-1, 1, 4, 4).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        return self.head(self.backbone.forward_features(images.masked_fill(hidden, 0.0))[:, 1:])

    def loss(self, outputs: Tensor, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        return (outputs - F.pixel_unshuffle(batch[0], 4).flatten(2).mT).abs().mean()


def conv_mim(name: str, norm: Norm, *, own_mask: bool = False) -> ConvolutionalMIM:
    """Two convolutions, each with a norm, and a norm in the head."""
    layers = [norm(8), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1), norm(8)]
    return ConvolutionalMIM(name, MaskedConvNet(8, *layers), _head(8, norm), own_mask=own_mask)


def grn_mim(name: str) -> ConvolutionalMIM:
    """Two blocks of ConvNeXt V2, with global response normalization."""
    blocks = [
        ConvNeXtBlock(8, kernel_size=3, ls_init_value=None, use_grn=True, drop_path=0.1) for _ in range(2)
    ]
    return ConvolutionalMIM(name, MaskedConvNet(8, *blocks, LayerNorm2d(8)), _head(8, LayerNorm2d))


def vit_mim() -> ViTMIM:
    """One block."""
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2, "drop_path_rate": 0.1}
    return ViTMIM(VisionTransformer(img_size=16, patch_size=4, num_classes=0, global_pool="", **sizes))


def swin_mim() -> SwinMIM:
    """Two stages with windows of 2×2 patches."""
    sizes = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 2}
    backbone = SwinTransformer(img_size=16, patch_size=2, num_classes=0, global_pool="", **sizes)
    return SwinMIM(backbone, 16)


def monolith() -> MonolithicMIM:
    """The monolith in its wrapper."""
    return MonolithicMIM(Monolith())


def group_norm(channels: int) -> nn.Module:
    """Group normalization in two groups."""
    return nn.GroupNorm(2, channels)


NORMS: dict[str, Norm] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "GroupNorm": group_norm,
    "RmsNorm2d": RmsNorm2d,
    "LayerNorm2d": LayerNorm2d,
}


def _head(dim: int, norm: Norm, stride: int = 4) -> nn.Module:
    return nn.Sequential(norm(dim), nn.Conv2d(dim, 3 * stride**2, 1), nn.PixelShuffle(stride))
