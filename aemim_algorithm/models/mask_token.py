"""timm's ViT and Swin with a learned token in the place of every hidden patch.

Unlike MAE's encoder these see the whole grid, so they fit models whose head reads a feature at every patch:
SimMIM (Xie et al. 2022, arXiv 2111.09886, section 3.2), BEiT, MaskFeat. Next to timm's parameters stands one
more, ``mask_token``; without it the state dict loads into a plain timm model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from aemim_algorithm.models.attention import use_our_attention
from aemim_algorithm.models.masking import require_image_size, require_mask_shape, upsample_mask
from aemim_algorithm.models.sizes import require_swin_sizes, require_vit_sizes

__all__ = ["MaskTokenSwin", "MaskTokenViT"]


class MaskTokenViT(VisionTransformer):
    """A timm ViT in which a learned token stands for every hidden patch.

    Args:
        image_size: Side of the square input, or (height, width), in pixels: multiples of ``patch_size``.
        patch_size: Side of a patch, in pixels.
        embed_dim: Width of the transformer, a multiple of ``num_heads``.
        depth: Number of blocks.
        num_heads: Attention heads of each block.
        drop_path: Rate of stochastic depth in the last block, rising linearly from 0 in the first; in [0, 1).
        layer_scale: Start value of a learned factor on each residual branch; ``None`` for no such factor.
        depth_scaled_init: Whether residual branches start smaller the deeper they lie, as BEiT and SimMIM
            have it.

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
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        depth_scaled_init: bool = True,
    ) -> None:
        require_vit_sizes(
            image_size=image_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            drop_path=drop_path,
        )
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            drop_path_rate=drop_path,
            init_values=layer_scale,
            num_classes=0,
            global_pool="",
            fix_init=depth_scaled_init,
        )
        use_our_attention(self)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        for weight in (self.cls_token, self.mask_token, self.patch_embed.proj.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.patch_embed.proj.bias)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.patch_embed.grid_size

    @property
    def patch_size(self) -> int:
        """Side of a patch, in pixels."""
        return self.patch_embed.patch_size[0]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters of two and more dimensions that are not decayed."""
        return super().no_weight_decay() | {"mask_token"}

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """One FSDP unit per block, inside the one that Composer makes of a model's child."""
        return isinstance(module, Block)

    def activation_checkpointing_fn(self, module: nn.Module) -> bool:
        """What is recomputed in backward under Composer's ``activation_checkpointing``: each block."""
        return isinstance(module, Block)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode images of which some patches are hidden.

        Args:
            images: Shape (batch, 3, height, width), float, normalised.
            mask: Shape (batch, patches), bool, true where hidden; ``None`` hides nothing.

        Returns:
            Features after the final norm, shape (batch, 1 + patches, dim): class token, then the patches
            in raster order.

        Raises:
            ValueError: If images or mask do not have the size that the model was built for.
        """
        require_image_size(images, self.patch_embed.img_size)
        tokens = self.patch_embed(images)
        if mask is not None:
            require_mask_shape(mask, tokens.shape[:2])
            tokens = torch.where(mask[:, :, None], self.mask_token.to(tokens.dtype), tokens)
        return self.norm(self.blocks(self.norm_pre(self._pos_embed(tokens))))


class MaskTokenSwin(SwinTransformer):
    """A timm Swin Transformer in which a learned token stands for every hidden patch.

    Its features are those of the last stage, each of which covers ``patch_size * 2**(stages - 1)`` pixels a
    side. The mask has that grid, too: a finer one would show the features of hidden patches what is hidden.

    Args:
        image_size: Side of the square input, or (height, width), in pixels.
        patch_size: Side of a patch of the first stage, in pixels.
        window_size: Side of an attention window, in patches of its stage.
        embed_dim: Width of the first stage; each further stage has twice the width of the one before.
        depths: Number of blocks of each stage.
        num_heads: Attention heads of each stage.
        drop_path: Rate of stochastic depth in the last block, rising linearly from 0 in the first; in [0, 1).

    Raises:
        ValueError: If a size cannot be built, the image is not cut evenly into features, or a stage not
            into windows.
    """

    num_prefix_tokens = 0  # of timm's ViT; Swin has no class token

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int,
        window_size: int,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        drop_path: float = 0.0,
    ) -> None:
        require_swin_sizes(
            image_size=image_size,
            patch_size=patch_size,
            window_size=window_size,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            drop_path=drop_path,
        )
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            window_size=window_size,
            embed_dim=embed_dim,
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            drop_path_rate=drop_path,
            num_classes=0,
            global_pool="",
        )
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of features, and of the mask."""
        rows, columns = self.patch_embed.grid_size
        return rows // self._merged, columns // self._merged

    @property
    def patch_size(self) -> int:
        """Side of what one feature, and one entry of the mask, covers, in pixels."""
        return self.patch_embed.patch_size[0] * self._merged

    @property
    def _merged(self) -> int:
        """Patches of the first stage along one side of a feature of the last."""
        return 2 ** (self.num_layers - 1)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters of two and more dimensions that are not decayed."""
        return super().no_weight_decay() | {"mask_token"}

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """One FSDP unit per block, inside the one that Composer makes of a model's child."""
        return isinstance(module, SwinTransformerBlock)

    def activation_checkpointing_fn(self, module: nn.Module) -> bool:
        """What is recomputed in backward under Composer's ``activation_checkpointing``: each block."""
        return isinstance(module, SwinTransformerBlock)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode images of which some patches are hidden.

        Args:
            images: Shape (batch, 3, height, width), float, normalised.
            mask: Shape (batch, rows * columns of ``grid``), bool, true where hidden; ``None`` hides nothing.

        Returns:
            Features after the final norm, shape (batch, rows * columns of ``grid``, dim), in raster order.

        Raises:
            ValueError: If images or mask do not have the size that the model was built for.
        """
        require_image_size(images, self.patch_embed.img_size)
        tokens = self.patch_embed(images)
        if mask is not None:
            require_mask_shape(mask, (len(images), self.grid[0] * self.grid[1]))
            fine = upsample_mask(mask, self.grid, self._merged).view(*tokens.shape[:3], 1)
            tokens = torch.where(fine, self.mask_token.to(tokens.dtype), tokens)
        return self.norm(self.layers(tokens)).flatten(1, 2)
