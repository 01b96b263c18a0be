"""BEiT (Bao et al. 2022, arXiv 2106.08254): predict the visual tokens of hidden patches.

The codes come from a frozen tokenizer that is given as a file. It is no submodule: its weights are in no
checkpoint, no optimizer, no FSDP unit and no copy of the model, and AEMIM does not adapt them. A checkpoint
keeps a fingerprint of it, so that training cannot go on with another one. It costs one forward pass of the
tokenizer for each batch, on ``stride`` pixels a side for each patch. A second loss on the very same images,
such as AEMIM's, finds their codes remembered.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn import functional as F

from aemim_algorithm.models.block_masked import BlockMasked
from aemim_algorithm.models.mask_token import MaskTokenViT
from aemim_algorithm.models.masking import images_in, pixels_of
from aemim_algorithm.models.tokenizer import VisualTokenizer

__all__ = ["BEiT"]


class BEiT(BlockMasked):
    """Masked prediction of discrete codes, on a ViT with learned absolute positions as in the paper.

    The published ViT-B has shared relative positions instead. A plain timm ViT has none, and could not load
    them.

    Args:
        tokenizer: Path of the tokenizer's weights, as :meth:`VisualTokenizer.from_file` reads them.
        image_size: Side of the square input, or (height, width), in pixels.
        patch_size: Side of a patch, in pixels.
        embed_dim: Width of the transformer.
        depth: Number of blocks.
        num_heads: Attention heads of each block.
        drop_path: Rate of stochastic depth in the last block, in [0, 1).
        layer_scale: Start value of a learned factor on each residual branch; ``None`` for none.
        mask_ratio: Share of the patches that is hidden, in (0, 1); their number is rounded down. The
            default hides the paper's 75 of 196.
        min_block: Smallest rectangle of the mask, in patches, at least 1.
        vocab_size: Refuse a tokenizer with any other number of codes; ``None`` takes what it has.
        mean: Mean of the images' normalisation, one value for each channel, in [0, 1] pixels.
        std: Standard deviation of the images' normalisation, likewise.

    Raises:
        ValueError: If the tokenizer cannot be read or has another vocabulary, a size cannot be built, or the
            mask cannot work.
    """

    tokenizer_print: Tensor

    def __init__(
        self,
        *,
        tokenizer: str,
        image_size: int | tuple[int, int],
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        mask_ratio: float = 0.385,
        min_block: int = 16,
        vocab_size: int | None = None,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        frozen = _Frozen(VisualTokenizer.from_file(tokenizer, vocab_size=vocab_size))
        encoder = MaskTokenViT(
            image_size=image_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            drop_path=drop_path,
            layer_scale=layer_scale,
        )
        codes = frozen.tokenizer.vocab_size
        super().__init__(encoder, out_features=codes, mask_ratio=mask_ratio, min_block=min_block)
        self._frozen = frozen
        self._last = _LastCodes()
        self.mean, self.std = tuple(mean), tuple(std)
        self.register_buffer("tokenizer_print", torch.tensor(frozen.tokenizer.fingerprint()))
        self.register_load_state_dict_pre_hook(_require_same_tokenizer)

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """The tokenizer's code of every patch.

        Args:
            images: Normalised, shape (batch, 3, height, width).

        Returns:
            Shape (batch, patches), int64, in raster order.
        """
        tokenizer = self._frozen.on(images.device)
        size = [side * tokenizer.stride for side in self.encoder.grid]
        pixels = pixels_of(images, self.mean, self.std)
        if list(pixels.shape[-2:]) != size:
            # The tokenizer has its own resolution: 112 pixels for 14 patches and a stride of 8.
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        return tokenizer.codes(pixels).flatten(1)

    def loss(self, outputs: dict[str, Tensor], batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Cross entropy of the hidden patches' codes, in float32.

        Args:
            outputs: What :meth:`forward` returned.
            batch: The batch whose images are tokenized.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            Scalar, float32.
        """
        codes = self._last.of(images_in(batch), self.codes)
        target = self.take_hidden(codes, outputs["mask"])
        return F.cross_entropy(outputs["prediction"].float().flatten(0, 1), target.flatten())

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed, beside vectors: tokens and positions."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}


class _Frozen:
    """Holds the tokenizer out of sight of ``nn.Module``; copies of the model share it."""

    def __init__(self, tokenizer: VisualTokenizer) -> None:
        self.tokenizer = tokenizer

    def on(self, device: torch.device) -> VisualTokenizer:
        if next(self.tokenizer.parameters()).device != device:
            self.tokenizer.to(device)
        return self.tokenizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Frozen:
        return self


class _LastCodes:
    """Remembers the codes of the last images, but does not keep those alive; a copy starts empty."""

    def __init__(self) -> None:
        self._images: weakref.ref[Tensor] | None = None
        self._version = 0
        self._codes: Tensor | None = None

    def of(self, images: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """The codes of images, computed unless these are the very ones of the last call, unchanged."""
        if images.is_inference():  # without a count of the changes made to it
            return compute(images)
        last = None if self._images is None else self._images()
        if self._codes is None or last is not images or self._version != images._version:
            self._codes = compute(images)
            self._images, self._version = weakref.ref(images), images._version
        return self._codes

    def __reduce__(self) -> tuple[type[_LastCodes], tuple[()]]:
        return _LastCodes, ()


def _require_same_tokenizer(model: BEiT, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuse a state dict that was trained with another tokenizer."""
    found = state.get(f"{prefix}tokenizer_print")
    # A tolerance, because what averages or casts buffers may have changed the last bits.
    if found is not None and abs(float(found) - float(model.tokenizer_print)) > 1e-3:
        raise ValueError(
            "the checkpoint was trained with another tokenizer than this model's: its codes mean something "
            "else; pass the tokenizer of that run"
        )
