"""SimMIM (Xie et al. 2022, arXiv 2111.09886) as a Composer model on timm's ViT or Swin.

The encoder sees the whole grid, with a learned token in the place of hidden patches; one linear layer
turns each feature into the pixels that it covers (section 3.3). The mask is an explicit argument and
stands in the outputs, so that a second pass can be given the very same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from composer.models import ComposerModel
from torch import Tensor, nn

from aemim_algorithm.models.mask_token import MaskTokenSwin, MaskTokenViT
from aemim_algorithm.models.masking import (
    images_in,
    mask_images,
    num_visible,
    patchify,
    random_mask,
    require_mask_shape,
    sample_seeds,
    unpatchify,
    upsample_mask,
)

__all__ = ["SimMIM", "simmim_swin", "simmim_vit"]


class SimMIM(ComposerModel):
    """An encoder with a mask token and a linear head that predicts pixels.

    Args:
        encoder: The encoder.
        mask_patch_size: Side of the patches that are hidden as one, in pixels: a multiple of those that a
            feature covers.
        mask_ratio: Share of them that is hidden, in (0, 1), rounded up.

    Raises:
        ValueError: If the mask patches do not fit the features, or none is hidden or none visible.
    """

    def __init__(
        self,
        encoder: MaskTokenViT | MaskTokenSwin,
        *,
        mask_patch_size: int = 32,
        mask_ratio: float = 0.6,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = nn.Linear(encoder.num_features, 3 * encoder.patch_size**2)
        self.mask_patch_size = mask_patch_size
        self.mask_ratio = mask_ratio
        self.mask_grid = _mask_grid(encoder, mask_patch_size)
        self.num_patches = self.mask_grid[0] * self.mask_grid[1]
        visible = num_visible(self.num_patches, mask_ratio)
        if not 0 < visible < self.num_patches:
            raise ValueError(
                f"mask_ratio={mask_ratio} leaves {visible} of {self.num_patches} mask patches visible: "
                "choose a ratio in (0, 1) that leaves at least one visible and one hidden"
            )

    def forward(self, batch: Any, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Predict the pixels of a batch.

        Args:
            batch: ``(images, labels)``, a dict or any batch in which the images are the first float
                tensor of shape (batch, 3, height, width); normalised.
            mask: Shape (batch, mask patches), bool, true where hidden; drawn at random if ``None``,
                from the samples' seeds if the batch has a ``"seed"``.

        Returns:
            ``prediction``, shape (batch, 3, height, width), and the ``mask``.
        """
        images, encoder = images_in(batch), self.encoder
        if mask is None:
            mask = random_mask(
                images.shape[0],
                self.num_patches,
                self.mask_ratio,
                device=images.device,
                seeds=sample_seeds(batch),
            )
        require_mask_shape(mask, (images.shape[0], self.num_patches))
        hidden = upsample_mask(mask, self.mask_grid, self.mask_patch_size // encoder.patch_size)
        features = encoder(images, hidden)[:, encoder.num_prefix_tokens :]
        prediction = unpatchify(self.decoder(features), encoder.patch_size, encoder.grid)
        return {"prediction": prediction, "mask": mask}

    def loss(self, outputs: dict[str, Tensor], batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Mean absolute error over the pixels of the hidden patches, in float32 (section 3.4).

        Args:
            outputs: What :meth:`forward` returned.
            batch: The batch whose images are the target.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            Scalar, float32; zero if nothing is hidden.
        """
        difference = (outputs["prediction"].float() - images_in(batch).float()).abs()
        error = patchify(difference, self.mask_patch_size).mean(dim=-1)
        hidden = outputs["mask"].to(error.dtype)
        return (error * hidden).sum() / hidden.sum().clamp(min=1)

    def reconstruct(
        self, outputs: dict[str, Tensor], batch: Any, *, visible_from: Tensor | None = None
    ) -> Tensor:
        """Put predicted hidden patches beside visible ones.

        Args:
            outputs: What :meth:`forward` returned.
            batch: The clean batch.
            visible_from: Images whose visible patches are shown; those of the batch if ``None``.

        Returns:
            Normalised images, shape (batch, 3, height, width), float32.
        """
        seen = images_in(batch) if visible_from is None else visible_from
        prediction = outputs["prediction"].float()
        return mask_images(seen.float(), outputs["mask"], self.mask_patch_size, fill=prediction)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed, beside vectors: tokens and positions."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}


def simmim_vit(
    *,
    image_size: int | tuple[int, int],
    patch_size: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    drop_path: float = 0.0,
    layer_scale: float | None = None,
    mask_patch_size: int = 32,
    mask_ratio: float = 0.6,
) -> SimMIM:
    """SimMIM on a ViT with learned absolute positions; arguments as in its two parts.

    The published ViT-B has shared relative positions and a layer scale of 0.1 instead. A plain timm ViT has
    neither, and could not load it.
    """
    encoder = MaskTokenViT(
        image_size=image_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        drop_path=drop_path,
        layer_scale=layer_scale,
    )
    return SimMIM(encoder, mask_patch_size=mask_patch_size, mask_ratio=mask_ratio)


def simmim_swin(
    *,
    image_size: int | tuple[int, int],
    patch_size: int,
    window_size: int,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    drop_path: float = 0.0,
    mask_patch_size: int = 32,
    mask_ratio: float = 0.6,
) -> SimMIM:
    """SimMIM on a Swin Transformer; arguments as in its two parts."""
    encoder = MaskTokenSwin(
        image_size=image_size,
        patch_size=patch_size,
        window_size=window_size,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=num_heads,
        drop_path=drop_path,
    )
    return SimMIM(encoder, mask_patch_size=mask_patch_size, mask_ratio=mask_ratio)


def _mask_grid(encoder: MaskTokenViT | MaskTokenSwin, mask_patch_size: int) -> tuple[int, int]:
    covered = encoder.patch_size
    height, width = (side * covered for side in encoder.grid)
    if (
        mask_patch_size < 1
        or mask_patch_size % covered
        or height % mask_patch_size
        or width % mask_patch_size
    ):
        raise ValueError(
            f"mask_patch_size={mask_patch_size} does not fit: expected a multiple of the {covered} pixels "
            f"that a feature covers, and a divisor of the image's {height} x {width}"
        )
    return height // mask_patch_size, width // mask_patch_size
