"""This package's own masked-image models, tiny: 16×16 images in 4×4 patches, 12 of 16 hidden.

All have dropout or stochastic depth: what the clean pass draws, the adversarial one must draw again.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from aemim_algorithm.models import MAE, BEiT, MaskFeat, SimMIM, VisualTokenizer, save_tokenizer
from aemim_algorithm.models.simmim import simmim_swin, simmim_vit

__all__ = ["beit", "mae", "maskfeat", "simmim_on_swin", "simmim_on_vit", "tokenizer_file"]

_VIT: dict[str, Any] = dict(  # noqa: C408
    image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2
)


def mae() -> MAE:
    """Masked autoencoder, with dropout in both halves."""
    model = MAE(**_VIT, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    for block in (model.encoder.blocks[0], model.decoder.blocks[0]):
        block.mlp.drop1.p = 0.1
    return model


def simmim_on_vit() -> SimMIM:
    """SimMIM on a ViT."""
    return simmim_vit(**_VIT, drop_path=0.2, mask_patch_size=4, mask_ratio=0.75)


def simmim_on_swin() -> SimMIM:
    """SimMIM on a Swin of two stages, with windows of 2×2 patches."""
    return simmim_swin(
        image_size=16,
        patch_size=2,
        window_size=2,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(1, 2),
        drop_path=0.2,
        mask_patch_size=4,
        mask_ratio=0.75,
    )


def maskfeat() -> MaskFeat:
    """MaskFeat, with histograms of whole patches."""
    return MaskFeat(**_VIT, drop_path=0.2, mask_ratio=0.75, min_block=2, cell_size=4)


def beit() -> BEiT:
    """BEiT, with a tokenizer of 16 codes."""
    return BEiT(tokenizer=str(tokenizer_file()), **_VIT, drop_path=0.2, mask_ratio=0.75, min_block=2)


@cache
def tokenizer_file() -> Path:
    """A tokenizer with random weights, large enough that images differ in their codes."""
    folder = Path(tempfile.mkdtemp(prefix="aemim-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        tokenizer = VisualTokenizer(hidden_size=8, vocab_size=16, num_groups=2, blocks_per_group=1)
        for parameter in tokenizer.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    save_tokenizer(tokenizer, folder / "tokenizer.pt")
    return folder / "tokenizer.pt"
