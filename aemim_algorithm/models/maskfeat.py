"""MaskFeat on images (Wei et al. 2022, arXiv 2112.09133): predict the HOG features of hidden patches.

Details that the paper leaves open are those of the authors' published configuration for ViT-B: no layer
starts smaller than another, and weight decay spares vectors only, not the tokens and positions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from aemim_algorithm.models.block_masked import BlockMasked
from aemim_algorithm.models.hog import hog_patches
from aemim_algorithm.models.mask_token import MaskTokenViT
from aemim_algorithm.models.masking import images_in
from aemim_algorithm.validation import require_integer

__all__ = ["MaskFeat"]


class MaskFeat(BlockMasked):
    """Masked feature prediction with histograms of oriented gradients.

    Args:
        image_size: Side of the square input, or (height, width), in pixels.
        patch_size: Side of a patch, in pixels.
        embed_dim: Width of the transformer.
        depth: Number of blocks.
        num_heads: Attention heads of each block.
        drop_path: Rate of stochastic depth in the last block, in [0, 1).
        mask_ratio: Share of the patches that is hidden, in (0, 1); their number is rounded down.
        min_block: Smallest rectangle of the mask, in patches; the default is a fifth of the 78 of 196 that
            are hidden.
        cell_size: Side of a histogram's cell, in pixels, a divisor of ``patch_size``.
        orientations: Bins of a histogram, at least 1.

    Raises:
        ValueError: If a size cannot be built, the cells do not divide a patch, or the mask cannot work.
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
        mask_ratio: float = 0.4,
        min_block: int = 15,
        cell_size: int = 8,
        orientations: int = 9,
    ) -> None:
        require_integer("orientations", orientations, low=1)
        require_integer("cell_size", cell_size, low=1)
        if patch_size % cell_size:
            raise ValueError(f"cell_size={cell_size}: expected a divisor of patch_size={patch_size} pixels")
        encoder = MaskTokenViT(
            image_size=image_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            drop_path=drop_path,
            depth_scaled_init=False,
        )
        out_features = 3 * orientations * (patch_size // cell_size) ** 2
        super().__init__(encoder, out_features=out_features, mask_ratio=mask_ratio, min_block=min_block)
        self.cell_size = cell_size
        self.orientations = orientations

    def loss(self, outputs: dict[str, Tensor], batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Mean squared error of the hidden patches' histograms, in float32.

        Args:
            outputs: What :meth:`forward` returned.
            batch: The batch whose images are the target; HOG is the same for normalised ones.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            Scalar, float32.
        """
        target = hog_patches(
            images_in(batch).detach(),
            self.encoder.patch_size,
            cell_size=self.cell_size,
            orientations=self.orientations,
        )
        return F.mse_loss(outputs["prediction"].float(), self.take_hidden(target, outputs["mask"]))
