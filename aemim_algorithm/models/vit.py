"""timm's Vision Transformer, able to look at some patches only, with sin-cos positions.

The parameters keep timm's names, so that an encoder trained here loads into a plain timm model.
"""

from __future__ import annotations

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from aemim_algorithm.models.attention import use_our_attention
from aemim_algorithm.models.masking import patchify, require_image_size
from aemim_algorithm.models.sizes import require_vit_sizes

__all__ = ["MaskedViT", "init_like_mae", "sincos_position"]


class MaskedViT(VisionTransformer):
    """A timm ViT whose forward embeds and encodes the visible patches only.

    Args:
        image_size: Side of the square input, or (height, width), in pixels: multiples of ``patch_size``.
        patch_size: Side of a patch, in pixels.
        embed_dim: Width of the transformer, a multiple of 4 and of ``num_heads``.
        depth: Number of blocks.
        num_heads: Attention heads of each block.

    Raises:
        ValueError: If a size cannot be built.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
    ) -> None:
        require_vit_sizes(
            image_size=image_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
        )
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            num_classes=0,
            global_pool="",
            weight_init="skip",
        )
        use_our_attention(self)
        self.pos_embed.requires_grad = False
        with torch.no_grad():
            self.pos_embed.copy_(sincos_position(self.grid, embed_dim))
            nn.init.normal_(self.cls_token, std=0.02)
        init_like_mae(self)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.patch_embed.grid_size

    @property
    def patch_size(self) -> int:
        """Side of a patch, in pixels."""
        return self.patch_embed.patch_size[0]

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """One FSDP unit per block, inside the one that Composer makes of a model's child."""
        return isinstance(module, Block)

    def activation_checkpointing_fn(self, module: nn.Module) -> bool:
        """What is recomputed in backward under Composer's ``activation_checkpointing``: each block."""
        return isinstance(module, Block)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """Encode images, or their visible patches.

        Args:
            images: Shape (batch, 3, height, width), float, normalised.
            visible: Indices of the patches to look at, shape (batch, count), int64; ``None`` for all.

        Returns:
            Features after the final norm, shape (batch, 1 + count, dim): class token, then the
            patches in the order of ``visible``.

        Raises:
            ValueError: If the images do not have the size that the model was built for.
        """
        require_image_size(images, self.patch_embed.img_size)
        patches = patchify(images, self.patch_size)
        positions = self.pos_embed[:, 1:]
        if visible is not None:
            # Before the embedding: at 75% masked this spares three quarters of its work.
            patches = take_tokens(patches, visible)
            positions = F.embedding(visible, positions[0])
        projection = self.patch_embed.proj
        tokens = F.linear(patches, projection.weight.flatten(1), projection.bias) + positions
        first = self.cls_token + self.pos_embed[:, :1]
        tokens = torch.cat([first.expand(images.shape[0], -1, -1), tokens], dim=1)
        return self.norm(self.blocks(tokens))


def take_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Pick tokens of shape (batch, tokens, dim) by an index of shape (batch, count)."""
    # Whole rows of one matrix: a gather goes from number to number.
    starts = torch.arange(0, tokens.shape[0] * tokens.shape[1], tokens.shape[1], device=index.device)
    rows = tokens.flatten(0, 1).index_select(0, (starts[:, None] + index).flatten())
    return rows.unflatten(0, index.shape)


def sincos_position(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed 2-D sin-cos position embedding with a zero for the class token.

    Args:
        grid: Rows and columns of patches.
        dim: Width of the embedding, a multiple of 4.

    Returns:
        Shape (1, 1 + rows * columns, dim), float32. The first half encodes the column, the second
        the row, as in the published MAE checkpoints.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sin-cos position embedding needs a width divisible by 4, got {dim}")
    row, column = build_sincos2d_pos_embed(list(grid), dim=dim, interleave_sin_cos=True).chunk(2, 1)
    return F.pad(torch.cat([column, row], dim=1), (0, 0, 1, 0))[None]


def init_like_mae(model: nn.Module) -> None:
    """Xavier-uniform for every linear layer and the patch embedding, in place (paper, Table 1)."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.data.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
