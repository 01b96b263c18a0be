"""Masked-image models that come with the package, as Composer models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from composer.models import ComposerModel

from aemim_algorithm.models.mae import MAE

__all__ = ["MAE", "MODELS"]

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
}
"""Builders by name; each takes the keyword arguments of its model to override the named size."""
