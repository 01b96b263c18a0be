"""Masked autoencoder (He et al. 2022, arXiv 2111.06377) as a Composer model on timm's ViT.

The encoder sees the visible patches; a small decoder reconstructs the hidden ones from them. The mask is an
explicit argument and stands in the outputs, so that a second pass can be given the very same one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from composer.models import ComposerModel
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from aemim_algorithm.models.attention import TailBlock
from aemim_algorithm.models.masking import (
    hidden_indices,
    images_in,
    normalize_patches,
    num_visible,
    patchify,
    random_mask,
    sample_seeds,
    split_indices,
    unpatchify,
)
from aemim_algorithm.models.sizes import require_width
from aemim_algorithm.models.vit import MaskedViT, init_like_mae, sincos_position, take_tokens
from aemim_algorithm.validation import require_integer

__all__ = ["MAE", "MAEDecoder"]


class MAE(ComposerModel):
    """Masked autoencoder.

    Args:
        image_size: Side of the square input, or (height, width), in pixels.
        patch_size: Side of a patch, in pixels.
        embed_dim: Width of the encoder.
        depth: Blocks of the encoder.
        num_heads: Attention heads of the encoder.
        decoder_dim: Width of the decoder.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
        mask_ratio: Share of the patches that is hidden, in (0, 1).
        norm_pixel_target: Whether each target patch is normalised by its own mean and deviation.

    Raises:
        ValueError: If a size cannot be built, or the mask leaves no patch visible or none hidden.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask_ratio: float = 0.75,
        norm_pixel_target: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = MaskedViT(
            image_size=image_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
        )
        self.decoder = MAEDecoder(
            self.encoder.grid,
            patch_size=patch_size,
            encoder_dim=embed_dim,
            dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
        )
        self.mask_ratio = mask_ratio
        self.norm_pixel_target = norm_pixel_target
        self.num_patches = self.encoder.patch_embed.num_patches
        self.num_visible = num_visible(self.num_patches, mask_ratio)
        if not 0 < self.num_visible < self.num_patches:
            raise ValueError(
                f"mask_ratio={mask_ratio} leaves {self.num_visible} of {self.num_patches} patches "
                "visible: choose a ratio in (0, 1) that leaves at least one visible and one hidden"
            )

    def forward(self, batch: Any, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Reconstruct the images of a batch.

        Args:
            batch: ``(images, labels)``, a dict or any batch in which the images are the first float
                tensor of shape (batch, 3, height, width); normalised.
            mask: Shape (batch, patches), bool, true where hidden, the same number in each row;
                drawn at random if ``None``, from the samples' seeds if the batch has a ``"seed"``.

        Returns:
            ``prediction``, shape (batch, hidden patches, pixels of a patch), of the hidden patches in
            raster order, and the ``mask``.
        """
        images = images_in(batch)
        if mask is None:
            mask = random_mask(
                images.shape[0],
                self.num_patches,
                self.mask_ratio,
                device=images.device,
                seeds=sample_seeds(batch),
            )
        self._require_mask(mask, images.shape[0])
        visible, hidden = split_indices(mask, self.num_visible)
        latent = self.encoder(images, visible)
        return {"prediction": self.decoder(latent, visible, hidden), "mask": mask}

    def loss(self, outputs: dict[str, Tensor], batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Mean squared error over the hidden patches, in float32 (Eq. 1).

        Args:
            outputs: What :meth:`forward` returned.
            batch: The batch whose images are the target.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            Scalar, float32.
        """
        target = take_tokens(self._patches(batch), self._hidden(outputs))
        if self.norm_pixel_target:
            target, _, _ = normalize_patches(target)
        return F.mse_loss(outputs["prediction"].float(), target)

    def reconstruct(
        self, outputs: dict[str, Tensor], batch: Any, *, visible_from: Tensor | None = None
    ) -> Tensor:
        """Put predicted hidden patches beside visible ones.

        With ``norm_pixel_target`` the model predicts the structure of a patch only: the true mean and
        standard deviation of each hidden patch are used to show it. Say so beside a picture.

        Args:
            outputs: What :meth:`forward` returned.
            batch: The clean batch.
            visible_from: Images whose visible patches are shown; those of the batch if ``None``.

        Returns:
            Normalised images, shape (batch, 3, height, width), float32.
        """
        prediction, patches, hidden = (
            outputs["prediction"].float(),
            self._patches(batch),
            self._hidden(outputs),
        )
        if self.norm_pixel_target:
            _, mean, std = normalize_patches(take_tokens(patches, hidden))
            prediction = prediction * std + mean
        patch_size = self.encoder.patch_size
        seen = patches if visible_from is None else patchify(visible_from.float(), patch_size)
        shown = seen.scatter(1, hidden[:, :, None].expand_as(prediction), prediction)
        return unpatchify(shown, patch_size, self.encoder.grid)

    def _patches(self, batch: Any) -> Tensor:
        return patchify(images_in(batch).float(), self.encoder.patch_size)

    def _hidden(self, outputs: dict[str, Tensor]) -> Tensor:
        return hidden_indices(outputs["mask"], self.num_patches - self.num_visible)

    def _require_mask(self, mask: Tensor, batch_size: int) -> None:
        expected = (batch_size, self.num_patches)
        if tuple(mask.shape) != expected:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {expected} (batch, patches)")
        # Checked on the device: a GPU is not waited for.
        torch._assert_async(
            (mask.sum(dim=1) == self.num_patches - self.num_visible).all(),
            f"every row of the mask must be one that leaves {self.num_visible} of {self.num_patches} "
            "patches visible",
        )


class MAEDecoder(nn.Module):
    """Reconstructs the hidden patches from the encoder's features of the visible ones.

    Args:
        grid: Rows and columns of patches.
        patch_size: Side of a patch, in pixels.
        encoder_dim: Width of the features that come in.
        dim: Width of the decoder, a multiple of 4 and of ``num_heads``.
        depth: Number of blocks.
        num_heads: Attention heads of each block.

    Raises:
        ValueError: If a size cannot be built.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        *,
        patch_size: int,
        encoder_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        require_width("decoder_dim", dim, "decoder_heads", num_heads)
        require_integer("decoder_depth", depth, low=1)
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_position(grid, dim), requires_grad=False)
        self.blocks = nn.Sequential(
            *(TailBlock(dim, num_heads, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth))
        )
        self.norm = norm_layer(dim)
        self.head = nn.Linear(dim, 3 * patch_size**2)
        nn.init.normal_(self.mask_token, std=0.02)
        init_like_mae(self)

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """One FSDP unit per block, inside the one that Composer makes of a model's child."""
        return isinstance(module, Block)

    def activation_checkpointing_fn(self, module: nn.Module) -> bool:
        """What is recomputed in backward under Composer's ``activation_checkpointing``: each block."""
        return isinstance(module, Block)

    def forward(self, latent: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Predict the pixels of the hidden patches.

        Args:
            latent: Encoder features, shape (batch, 1 + visible patches, encoder dim).
            visible: Indices of the visible patches, shape (batch, visible patches), int64.
            hidden: Indices of the hidden patches, shape (batch, hidden patches), int64.

        Returns:
            Shape (batch, hidden patches, pixels of a patch), in the order of ``hidden``.
        """
        # Attention does not care for the order of tokens: the hidden patches stand last, and what comes
        # after the last block's keys and values is computed for them alone.
        first, positions = self.pos_embed[:, :1], self.pos_embed[0, 1:]
        seen = self.embed(latent) + torch.cat(
            [first.expand(len(visible), -1, -1), F.embedding(visible, positions)], dim=1
        )
        tokens = torch.cat([seen, self.mask_token + F.embedding(hidden, positions)], dim=1)
        *blocks, last = self.blocks
        for block in blocks:
            tokens = block(tokens)
        return self.head(self.norm(last(tokens, last=hidden.shape[1])))
