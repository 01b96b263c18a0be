"""A plain ViT as the backbone of a detector: any image size, attention in windows, a simple pyramid.

The encoder keeps timm's names and its final norm. Position embeddings, fixed sin-cos ones too, are
interpolated to the grid of the batch at hand, bicubically and with antialiasing, as timm does; the class
token's slot is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from aemim_algorithm.detection.pyramid import SimplePyramid, level_strides
from aemim_algorithm.detection.windows import use_windows
from aemim_algorithm.exchange.files import require_fit
from aemim_algorithm.models.classifier import Architecture, build_network

__all__ = ["ViTBackbone", "build_encoder", "load_encoder"]


class ViTBackbone(nn.Module):
    """Images to a pyramid of maps, as torchvision's detectors take them.

    Args:
        encoder: Of `build_encoder`.
        window: Largest side of an attention window, in patches; ``None``: all blocks attend to everything.
        global_blocks: How many blocks attend to everything all the same, evenly spread.
        channels: Width of the pyramid.
        frozen: Whether the encoder stays as it is; it then has no drop path either.
        recompute: Whether blocks are computed again in backward, to save memory.

    Raises:
        ValueError: The encoder is no plain ViT, or its patches are no power of two of at least 4 pixels.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        window: int | None = 14,
        global_blocks: int = 4,
        channels: int = 256,
        frozen: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        use_windows(encoder.blocks, window=window, global_blocks=global_blocks)
        self.patch_size = _patch_of(encoder)
        self.encoder = encoder.requires_grad_(not frozen)
        self.pyramid = SimplePyramid(encoder.embed_dim, channels)
        self.out_channels = channels  # where torchvision looks for it
        self.frozen, self.recompute = frozen, recompute

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels between two cells of each map."""
        return level_strides(self.patch_size)

    @property
    def divisor(self) -> int:
        """What the sides of images are padded to a multiple of: two patches, a cell of the fourth map."""
        return 2 * self.patch_size

    def train(self, mode: bool = True) -> ViTBackbone:
        """As of any module, except that a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Make the maps of images.

        Args:
            images: Shape (batch, 3, height, width), normalised; padded at the right and below if need be.

        Returns:
            The maps by torchvision's names, the finest first.
        """
        below, right = (-side % self.divisor for side in images.shape[-2:])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.features(F.pad(images, (0, right, 0, below)))
        return self.pyramid(features)

    def features(self, images: Tensor) -> Tensor:
        """The encoder's features of images whose sides are multiples of the patch.

        Returns:
            Those of the patches, shape (batch, dim, rows, columns).
        """
        encoder = self.encoder
        patches = encoder.patch_embed(images)
        grid = (patches.shape[1], patches.shape[2])
        tokens = encoder.norm_pre(encoder.patch_drop(encoder._pos_embed(patches)))
        for block in encoder.blocks:
            if self.recompute and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, grid, use_reentrant=False)
            else:
                tokens = block(tokens, grid)
        tokens = encoder.norm(tokens)[:, encoder.num_prefix_tokens :]
        return tokens.transpose(1, 2).unflatten(2, grid).contiguous()


def build_encoder(architecture: Architecture, *, drop_path: float = 0.0) -> VisionTransformer:
    """A ViT with random weights that takes images of any size.

    Args:
        architecture: Of :func:`~aemim_algorithm.models.classifier.architecture_of`; its image size is that of
            the position embeddings.
        drop_path: Rate of stochastic depth in the last block.

    Raises:
        ValueError: timm cannot build it, or it is no ViT.
    """
    options: dict[str, Any] = {"num_classes": 0, "global_pool": "", "drop_path_rate": drop_path}
    if str(architecture["name"]).startswith("swin"):
        raise ValueError(f"{architecture['name']}: a Swin has maps of its own; expected a plain ViT")
    encoder = build_network(architecture, dynamic_img_size=True, **options)
    assert isinstance(encoder, VisionTransformer)
    return encoder


def load_encoder(backbone: ViTBackbone, state: Mapping[str, Tensor], *, whose: str) -> None:
    """Start a backbone from an encoder's weights, strictly.

    Args:
        backbone: Whose encoder was built for the image size that the weights are for.
        state: In timm's names.
        whose: What the state is called in a message.

    Raises:
        ValueError: The state is that of another architecture; the line names what does not fit.
    """
    require_fit(backbone.encoder, state, whose=whose)
    backbone.encoder.load_state_dict(dict(state))


def _patch_of(encoder: VisionTransformer) -> int:
    height, width = encoder.patch_embed.patch_size
    if height != width or height < 4 or height & (height - 1):
        raise ValueError(
            f"got patches of {height}x{width} pixels; expected a power of two, at least 4: the maps of a "
            "pyramid halve one another"
        )
    return int(height)
