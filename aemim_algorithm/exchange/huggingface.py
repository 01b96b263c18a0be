"""Export to Hugging Face: a folder that ``from_pretrained`` reads, with nothing missing or left over.

The encoder becomes a ``ViTModel`` or a ``SwinModel`` without pooling layer; a MAE with its decoder
becomes a ``ViTMAEForPreTraining``, whose loss on the same mask is ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from aemim_algorithm.exchange.files import require_fit, require_folder_name, write_folder
from aemim_algorithm.exchange.layouts import (
    Layout,
    hf_swin_layout,
    hf_vit_layout,
    hf_vit_mae_layout,
    write_layout,
)
from aemim_algorithm.exchange.trained import Trained, require_model, timm_encoder, window_of

__all__ = ["export_huggingface"]

StateDict = dict[str, Tensor]


def export_huggingface(trained: Trained, out: Path) -> StateDict:
    """Write a folder with ``config.json`` and ``model.safetensors``.

    Args:
        trained: What to export, with its architecture.
        out: The folder.

    Returns:
        What was written.

    Raises:
        ValueError: If transformers is not installed, the architecture is not known, or Hugging Face's
            class cannot express it.
    """
    require_folder_name(out)
    model = require_model(trained, "format 'huggingface'")
    encoder = timm_encoder(model)
    with torch.random.fork_rng(devices=[]):  # it starts with random values, which training must not notice
        target, layout = _target(model, encoder, whole=trained.decoder is not None)
    state = write_layout(trained.renameable(), layout)
    # Indices of relative positions are buffers there that follow from the window.
    buffers = {k: v for k, v in target.state_dict().items() if k.endswith("relative_position_index")}
    state |= buffers
    require_fit(target, state, whose="the checkpoint")
    target.load_state_dict(state)
    write_folder(target.save_pretrained, out)
    return state


def _target(model: nn.Module, encoder: Any, *, whole: bool) -> tuple[Any, Layout]:
    """An empty model of Hugging Face with the architecture of ours, and its layout."""
    library = _transformers()
    if isinstance(encoder, SwinTransformer):
        config = library.SwinConfig(**_swin_options(encoder))
        return library.SwinModel(config, add_pooling_layer=False), hf_swin_layout
    if not whole:
        config = library.ViTConfig(**_vit_options(encoder))
        return library.ViTModel(config, add_pooling_layer=False), hf_vit_layout
    rows, columns = encoder.patch_embed.grid_size
    if rows != columns:
        raise ValueError(
            f"got a MAE of {rows}x{columns} patches; ViTMAEForPreTraining takes square images only: "
            "leave out --decoder for the encoder, which ViTModel takes, or pass --format mae"
        )
    config = library.ViTMAEConfig(**_vit_options(encoder), **_decoder_options(model))
    return library.ViTMAEForPreTraining(config), hf_vit_mae_layout


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        raise ValueError(
            "format 'huggingface' needs the package transformers, which is not installed: "
            "pip install 'transformers>=4.50,<5'"
        ) from None
    return transformers


def _vit_options(encoder: Any) -> dict[str, Any]:
    block = encoder.blocks[0]
    return _common_options(encoder) | {
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
    }


def _decoder_options(model: Any) -> dict[str, Any]:
    blocks = getattr(model.decoder, "blocks", None)
    if blocks is None:
        raise ValueError(
            f"got {type(model).__name__}, whose decoder has no blocks; expected a MAE: name the model that "
            "the checkpoint is of, or leave out --decoder"
        )
    return {
        "decoder_hidden_size": model.decoder.pos_embed.shape[-1],
        "decoder_num_hidden_layers": len(blocks),
        "decoder_num_attention_heads": blocks[0].attn.num_heads,
        "decoder_intermediate_size": blocks[0].mlp.fc1.out_features,
        "mask_ratio": model.mask_ratio,
        "norm_pix_loss": model.norm_pixel_target,
    }


def _swin_options(encoder: Any) -> dict[str, Any]:
    blocks = [block for stage in encoder.layers for block in stage.blocks]
    window = window_of(encoder)
    padded = [block for block in blocks if any(side % window for side in block.input_resolution)]
    if padded:  # timm shifts, then pads; Hugging Face pads, then shifts
        rows, columns = padded[0].input_resolution
        raise ValueError(
            f"got a Swin with a stage of {rows}x{columns} patches and windows of {window}; SwinModel pads it "
            "in another way: export at another --image-size or --window-size, or to timm"
        )
    # Hugging Face has one window for all stages, and shifts both axes or none.
    odd = [b for b in blocks if set(b.window_size) != {window} or len(set(b.shift_size)) > 1]
    if odd:
        size = odd[0].window_size
        raise ValueError(
            f"got a Swin with a window of {size[0]}x{size[1]} (shift {odd[0].shift_size}) beside "
            f"{window}; SwinModel has one square window: export at another --image-size or "
            "--window-size, or to timm"
        )
    return _common_options(encoder) | {
        "embed_dim": encoder.embed_dim,
        "depths": [len(stage.blocks) for stage in encoder.layers],
        "num_heads": [stage.blocks[0].attn.num_heads for stage in encoder.layers],
        "window_size": window,
        "mlp_ratio": blocks[0].mlp.fc1.out_features / blocks[0].mlp.fc1.in_features,
        "drop_path_rate": 0.0,
    }


def _common_options(encoder: Any) -> dict[str, Any]:
    height, width = encoder.patch_embed.img_size
    return {
        "image_size": height if height == width else [height, width],
        "patch_size": encoder.patch_embed.patch_size[0],
        "num_channels": encoder.patch_embed.proj.in_channels,
        "layer_norm_eps": encoder.norm.eps,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "qkv_bias": True,
    }
