"""Masked-image models of Hugging Face transformers, tiny and unmodified, inside Composer's wrapper.

Some have dropout and stochastic depth: what the clean pass draws, the adversarial one must draw again.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from composer.models import HuggingFaceModel

__all__ = [
    "beit",
    "deit",
    "focalnet",
    "hiera",
    "swin",
    "swinv2",
    "videomae",
    "vit",
    "vit_mae",
]

_VIT: dict[str, Any] = dict(  # noqa: C408
    image_size=16,
    patch_size=4,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    initializer_range=0.2,  # at 0.02 the features of so small a model hardly depend on the image
)
_DROPOUT: dict[str, Any] = dict(  # noqa: C408
    hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1
)
_HIERARCHICAL: dict[str, Any] = dict(  # noqa: C408
    image_size=16,
    patch_size=2,
    embed_dim=8,
    depths=[1, 1],
    num_heads=[1, 2],
    encoder_stride=4,
    initializer_range=0.2,
)


def vit_mae() -> HuggingFaceModel:
    """The loss against the clean pixels is computed inside ``forward``."""
    config = transformers.ViTMAEConfig(
        **_VIT,
        **_DROPOUT,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    return _wrapped(transformers.ViTMAEForPreTraining(config))


def vit() -> HuggingFaceModel:
    """SimMIM on a ViT; the mask is an argument."""
    config = transformers.ViTConfig(**_VIT, **_DROPOUT, encoder_stride=4)
    return _wrapped(transformers.ViTForMaskedImageModeling(config))


def deit() -> HuggingFaceModel:
    """SimMIM on a ViT with a distillation token."""
    config = transformers.DeiTConfig(**_VIT, encoder_stride=4)
    return _wrapped(transformers.DeiTForMaskedImageModeling(config))


def swin() -> HuggingFaceModel:
    """SimMIM on windows of 2×2 patches, with stochastic depth."""
    config = transformers.SwinConfig(**_HIERARCHICAL, window_size=2, drop_path_rate=0.2, **_DROPOUT)
    return _wrapped(transformers.SwinForMaskedImageModeling(config))


def swinv2() -> HuggingFaceModel:
    """SimMIM on Swin V2: norms after the residual branches, log-spaced positions."""
    config = transformers.Swinv2Config(**_HIERARCHICAL, window_size=2, drop_path_rate=0.1)
    return _wrapped(transformers.Swinv2ForMaskedImageModeling(config))


def focalnet() -> HuggingFaceModel:
    """SimMIM on focal modulation."""
    sizes = {key: value for key, value in _HIERARCHICAL.items() if key not in ("num_heads", "embed_dim")}
    config = transformers.FocalNetConfig(
        **sizes,
        embed_dim=8,
        hidden_sizes=[8, 16],
        focal_levels=[1, 1],
        focal_windows=[3, 3],
        drop_path_rate=0.1,
    )
    return _wrapped(transformers.FocalNetForMaskedImageModeling(config))


def beit() -> HuggingFaceModel:
    """Discrete targets: one visual token for each hidden patch, flat over the batch."""
    config = transformers.BeitConfig(
        **_VIT, **_DROPOUT, vocab_size=11, drop_path_rate=0.1, use_mask_token=True, layer_scale_init_value=0.1
    )
    return _wrapped(transformers.BeitForMaskedImageModeling(config))


def hiera() -> HuggingFaceModel:
    """Masks units of 2×2 tokens; pools its queries."""
    config = transformers.HieraConfig(
        embed_dim=8,
        image_size=[32, 32],
        patch_size=[7, 7],
        patch_stride=[4, 4],
        patch_padding=[3, 3],
        depths=[1, 1],
        num_heads=[1, 2],
        initializer_range=0.2,
        embed_dim_multiplier=2.0,
        num_query_pool=1,
        query_stride=[2, 2],
        masked_unit_size=[2, 2],
        masked_unit_attention=[True, False],
        drop_path_rate=0.1,
        decoder_hidden_size=16,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    return _wrapped(transformers.HieraForPreTraining(config))


def videomae() -> HuggingFaceModel:
    """Videos, shape (batch, frames, channels, height, width); unnormalises its target itself."""
    config = transformers.VideoMAEConfig(
        **_VIT,
        num_frames=2,
        tubelet_size=2,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    return _wrapped(transformers.VideoMAEForPreTraining(config))


def _wrapped(model: transformers.PreTrainedModel) -> HuggingFaceModel:
    # Tokens, positions and biases start at zero here, where gradients may vanish or explode.
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return HuggingFaceModel(model)
