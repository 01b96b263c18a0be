"""Masked-image models that come with the package, as Composer models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from composer.models import ComposerModel

from aemim_algorithm.models.beit import BEiT
from aemim_algorithm.models.dvae import DiscreteVAE
from aemim_algorithm.models.mae import MAE
from aemim_algorithm.models.maskfeat import MaskFeat
from aemim_algorithm.models.simmim import SimMIM, simmim_swin, simmim_vit
from aemim_algorithm.models.tokenizer import VisualTokenizer, save_tokenizer

__all__ = [
    "MAE",
    "MODELS",
    "BEiT",
    "DiscreteVAE",
    "MaskFeat",
    "SimMIM",
    "VisualTokenizer",
    "save_tokenizer",
]

MODELS: dict[str, Callable[..., ComposerModel]] = {
    "mae_vit_tiny_patch4": partial(
        MAE,
        image_size=32,
        patch_size=4,
        embed_dim=192,
        depth=12,
        num_heads=3,
        decoder_dim=128,
        decoder_depth=4,
        decoder_heads=4,
    ),
    "mae_vit_small_patch16": partial(
        MAE, image_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6
    ),
    "mae_vit_base_patch16": partial(
        MAE, image_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12
    ),
    "simmim_vit_tiny_patch4": partial(
        simmim_vit,
        image_size=32,
        patch_size=4,
        embed_dim=192,
        depth=12,
        num_heads=3,
        mask_patch_size=8,
    ),
    "simmim_vit_base_patch16": partial(
        simmim_vit,
        image_size=224,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        drop_path=0.1,
    ),
    "simmim_swin_tiny_patch2_window4": partial(
        simmim_swin,
        image_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=96,
        depths=(2, 2, 6),
        num_heads=(3, 6, 12),
        mask_patch_size=8,
    ),
    "simmim_swin_base_patch4_window6": partial(
        simmim_swin,
        image_size=192,
        patch_size=4,
        window_size=6,
        embed_dim=128,
        depths=(2, 2, 18, 2),
        num_heads=(4, 8, 16, 32),
    ),
    "maskfeat_vit_tiny_patch4": partial(
        MaskFeat, image_size=32, patch_size=4, embed_dim=192, depth=12, num_heads=3, cell_size=4, min_block=4
    ),
    "maskfeat_vit_base_patch16": partial(
        MaskFeat, image_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12
    ),
    "beit_vit_tiny_patch4": partial(
        BEiT, image_size=32, patch_size=4, embed_dim=192, depth=12, num_heads=3, min_block=4
    ),
    "beit_vit_base_patch16": partial(
        BEiT, image_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12
    ),
    "dvae_tiny_patch4": partial(
        DiscreteVAE, image_size=32, hidden_size=32, vocab_size=512, num_groups=3, code_dim=64
    ),
    "dvae_patch8": partial(DiscreteVAE, image_size=112),
}
"""Builders by name; each takes the keyword arguments of its model to override the named size."""
