"""What MaskFeat and BEiT have in common: rectangles hidden by a mask token, and one linear layer on top."""

from __future__ import annotations

from typing import Any

from composer.models import ComposerModel
from torch import Tensor, nn

from aemim_algorithm.models.mask_token import MaskTokenViT
from aemim_algorithm.models.masking import (
    block_mask,
    hidden_indices,
    images_in,
    require_mask_shape,
    sample_seeds,
)
from aemim_algorithm.models.vit import take_tokens
from aemim_algorithm.validation import require_integer

__all__ = ["BlockMasked"]


class BlockMasked(ComposerModel):
    """A ViT that sees mask tokens, and predicts something of every hidden patch; the loss is a subclass's.

    Args:
        encoder: The transformer.
        out_features: Values to predict of a patch.
        mask_ratio: Share of the patches that is hidden, in (0, 1); their number is rounded down.
        min_block: Smallest rectangle of the mask, in patches, at least 1.

    Raises:
        ValueError: If the mask leaves no patch visible or none hidden, or has rectangles of nothing.
    """

    def __init__(
        self, encoder: MaskTokenViT, *, out_features: int, mask_ratio: float, min_block: int
    ) -> None:
        require_integer("min_block", min_block, low=1)
        super().__init__()
        self.encoder = encoder
        self.decoder = nn.Linear(encoder.embed_dim, out_features)
        nn.init.trunc_normal_(self.decoder.weight, std=0.02)
        nn.init.zeros_(self.decoder.bias)
        self.mask_ratio = mask_ratio
        self.min_block = min_block
        self.num_patches = encoder.patch_embed.num_patches
        self.num_hidden = int(self.num_patches * mask_ratio)
        if not 0 < self.num_hidden < self.num_patches:
            raise ValueError(
                f"mask_ratio={mask_ratio} hides {self.num_hidden} of {self.num_patches} patches: choose a "
                "ratio in (0, 1) that leaves at least one visible and one hidden"
            )

    def forward(self, batch: Any, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Predict the hidden patches of the images of a batch.

        Args:
            batch: ``(images, labels)``, a dict or any batch in which the images are the first float
                tensor of shape (batch, 3, height, width); normalised.
            mask: Shape (batch, patches), bool, true where hidden, ``num_hidden`` in each row; drawn in
                rectangles if ``None``, from the samples' seeds if the batch has a ``"seed"``.

        Returns:
            ``prediction``, shape (batch, num_hidden, out_features), of the hidden patches in raster
            order, and the ``mask``.
        """
        images = images_in(batch)
        if mask is None:
            mask = block_mask(
                len(images),
                self.encoder.grid,
                self.num_hidden,
                min_patches=self.min_block,
                device=images.device,
                seeds=sample_seeds(batch),
            )
        require_mask_shape(mask, (len(images), self.num_patches))
        hidden = hidden_indices(mask, self.num_hidden)
        features = self.encoder(images, mask)
        return {"prediction": self.decoder(take_tokens(features[:, 1:], hidden)), "mask": mask}

    def take_hidden(self, values: Tensor, mask: Tensor) -> Tensor:
        """The values (batch, patches, …) of the hidden patches, shape (batch, num_hidden, …)."""
        hidden = hidden_indices(mask, self.num_hidden)
        return values.gather(1, hidden) if values.ndim == 2 else take_tokens(values, hidden)
