"""A discrete variational autoencoder: trains the tokenizer that BEiT needs (arXiv 2102.12092, section 2.1).

The tokenizer scores the codes of every place, one of them is drawn, and a decoder paints the image from the
drawn codes. Three choices differ from DALL-E's, so that nothing has to be annealed:

- The draw is a straight-through Gumbel-softmax (Jang et al. 2017) of one temperature: the decoder always sees
  whole codes.
- The prior is on the shares of the codes in a batch, not on each place: it asks for many codes without asking
  for unsure ones. (With a prior on each place, 240 steps of a small model at weights of 1e-4 and 1e-3 ended
  with 4 to 8 of 64 codes in use.)
- The error is the mean square of the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from composer.models import ComposerModel
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

from aemim_algorithm.models.masking import images_in, pixels_of, require_image_size
from aemim_algorithm.models.tokenizer import ResidualBlock, VisualTokenizer
from aemim_algorithm.validation import require_integer, require_number

__all__ = ["DiscreteVAE"]


class DiscreteVAE(ComposerModel):
    """Tokenizer and decoder, trained together.

    Args:
        image_size: Side of the square input in pixels, a multiple of the tokenizer's stride.
        hidden_size: Width of the tokenizer's first group, a multiple of 4.
        vocab_size: Number of codes.
        num_groups: Groups of the tokenizer: a code stands for ``2**(num_groups - 1)`` pixels a side.
        blocks_per_group: Residual blocks in each group, of tokenizer and decoder.
        code_dim: Width of a code's embedding, where the decoder starts, at least 1.
        temperature: Of the Gumbel-softmax, above 0; its gradient is sharper and noisier when lower.
        kl_weight: Weight, at least 0, of the divergence of the codes' shares in a batch from even ones, in
            nats.
        mean: Mean of the images' normalisation, one value for each channel, in [0, 1] pixels.
        std: Standard deviation of the images' normalisation, likewise.

    Raises:
        ValueError: If a size or a weight cannot work.
    """

    def __init__(
        self,
        *,
        image_size: int,
        hidden_size: int = 256,
        vocab_size: int = 8192,
        num_groups: int = 4,
        blocks_per_group: int = 2,
        code_dim: int = 128,
        temperature: float = 1.0,
        kl_weight: float = 0.02,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        require_integer("image_size", image_size, low=1)
        require_integer("code_dim", code_dim, low=1)
        require_number("temperature", temperature, low=0, low_open=True)
        require_number("kl_weight", kl_weight, low=0)
        super().__init__()
        self.encoder = VisualTokenizer(
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            num_groups=num_groups,
            blocks_per_group=blocks_per_group,
        )
        if image_size % self.encoder.stride:
            raise ValueError(f"image_size={image_size}: expected a multiple of {self.encoder.stride} pixels")
        self.decoder = _decoder(vocab_size, code_dim, hidden_size, num_groups, blocks_per_group)
        self.image_size = image_size
        self.temperature = temperature
        self.kl_weight = kl_weight
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Encode the images of a batch and paint them again.

        Args:
            batch: Normalised images, alone or in a batch as :func:`images_in` takes it.

        Returns:
            ``logits`` of the codes, shape (batch, vocab_size, rows, columns), and ``pixels`` painted
            from codes that are drawn in training and the most probable ones otherwise, shaped as the
            images, in the range of the pixels.
        """
        images = images_in(batch)
        require_image_size(images, (self.image_size, self.image_size))
        logits = self.encoder(pixels_of(images, self.mean, self.std)).float()
        if self.training:
            chosen = F.gumbel_softmax(logits, tau=self.temperature, hard=True, dim=1)
        else:
            chosen = F.one_hot(logits.argmax(dim=1), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
        return {"logits": logits, "pixels": self.decoder(chosen)}

    def loss(  # type: ignore[override]  # Composer takes a dict with "total", but does not say so
        self, outputs: dict[str, Tensor], batch: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Squared error of the pixels, and the divergence of the codes' shares from a uniform prior.

        Args:
            outputs: What :meth:`forward` returned.
            batch: The batch whose images are the target.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            ``total`` with gradient, and its parts ``reconstruction`` and ``kl`` (nats) without; scalars,
            float32.
        """
        target = pixels_of(images_in(batch), self.mean, self.std)
        reconstruction = F.mse_loss(outputs["pixels"].float(), target)
        share = outputs["logits"].float().softmax(dim=1).mean(dim=(0, 2, 3))
        kl = (share * share.clamp(min=1e-12).log()).sum() + math.log(self.encoder.vocab_size)
        return {
            "total": reconstruction + self.kl_weight * kl,
            "reconstruction": reconstruction.detach().clone(),
            "kl": kl.detach().clone(),
        }


def _decoder(vocab_size: int, code_dim: int, hidden_size: int, groups: int, blocks: int) -> nn.Sequential:
    """The tokenizer the other way round: codes, groups that double the resolution, pixels."""
    gain = 1 / (groups * blocks) ** 2
    layers: list[nn.Module] = [nn.Conv2d(vocab_size, code_dim, 1, bias=False)]
    width = code_dim
    for number in reversed(range(groups)):
        for _ in range(blocks):
            layers.append(ResidualBlock(width, hidden_size * 2**number, gain=gain))
            width = hidden_size * 2**number
        if number:
            layers.append(nn.Upsample(scale_factor=2))
    decoder = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, 3, 1))
    nn.init.normal_(decoder[0].weight, std=code_dim**-0.5)  # an embedding of each code, not a sum over codes
    nn.init.constant_(decoder[-1].bias, 0.5)  # grey
    return decoder
