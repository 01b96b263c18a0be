"""Whose parameter is called what: our names against those of other libraries.

A *layout* maps the name of one of our parameters to the name it has elsewhere, or to three names where
query, key and value are kept apart. Export and import read the same layout in its two directions, so
what goes out comes back bit by bit.

The names are facts about the published files: those of the original MAE checkpoints (He et al. 2022),
and of Hugging Face's ``ViTModel``, ``ViTMAEForPreTraining`` and ``SwinModel`` (transformers 4.57).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

__all__ = [
    "Layout",
    "hf_swin_layout",
    "hf_vit_layout",
    "hf_vit_mae_layout",
    "mae_layout",
    "mae_parameters",
    "read_layout",
    "write_layout",
]

StateDict = dict[str, Tensor]
Layout = Callable[[str], list[str]]
"""From one of our names to the names elsewhere; raises a ``KeyError`` for what has no place there."""

_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")

# The decoder of the original code; the encoder there has timm's names, as ours.
_MAE_DECODER = {
    "embed": "decoder_embed",
    "mask_token": "mask_token",
    "pos_embed": "decoder_pos_embed",
    "blocks": "decoder_blocks",
    "norm": "decoder_norm",
    "head": "decoder_pred",
}
_HF_VIT = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_HF_SWIN = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "patch_embed.norm": "embeddings.norm",
    "norm": "layernorm",
}
_HF_DECODER = {ours: theirs for ours, theirs in _MAE_DECODER.items() if ours != "blocks"}
_HF_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def mae_layout(ours: str) -> list[str]:
    """The original MAE checkpoints, with or without their decoder."""
    side, _, name = ours.partition(".")
    if side == "encoder":
        return [name]
    first, dot, rest = name.partition(".")
    return [_MAE_DECODER[first] + dot + rest]


def hf_vit_layout(ours: str) -> list[str]:
    """Hugging Face's ``ViTModel``: the encoder alone."""
    return _hugging_face(ours.removeprefix("encoder."), _HF_VIT, "encoder.layer", "attention.attention")


def hf_vit_mae_layout(ours: str) -> list[str]:
    """Hugging Face's ``ViTMAEForPreTraining``: encoder and decoder."""
    side, _, name = ours.partition(".")
    if side == "encoder":
        return [f"vit.{theirs}" for theirs in hf_vit_layout(name)]
    found = _hugging_face(name, _HF_DECODER, "decoder_layers", "attention.attention")
    return [f"decoder.{theirs}" for theirs in found]


def hf_swin_layout(ours: str) -> list[str]:
    """Hugging Face's ``SwinModel``: timm merges patches before a stage, Hugging Face after the last one."""
    name = ours.removeprefix("encoder.")
    if match := re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", name):
        return [f"encoder.layers.{int(match[1]) - 1}.downsample.{match[2]}"]
    if match := re.fullmatch(r"(layers\.\d+\.blocks\.\d+)\.attn\.relative_position_bias_table", name):
        return [f"encoder.{match[1]}.attention.self.relative_position_bias_table"]
    return _hugging_face(name, _HF_SWIN, "encoder.{}blocks", "attention.self")


def mae_parameters(depth: int, decoder_depth: int | None) -> list[str]:
    """Our names of all parameters of a MAE.

    Args:
        depth: Blocks of the encoder.
        decoder_depth: Blocks of the decoder; ``None`` for an encoder without one.
    """
    ends = ("weight", "bias")
    names = ["encoder.cls_token", "encoder.pos_embed"]
    names += [f"encoder.{module}.{end}" for module in ("patch_embed.proj", "norm") for end in ends]
    names += _block_parameters("encoder", depth)
    if decoder_depth is not None:
        names += ["decoder.mask_token", "decoder.pos_embed"]
        names += [f"decoder.{module}.{end}" for module in ("embed", "norm", "head") for end in ends]
        names += _block_parameters("decoder", decoder_depth)
    return names


def write_layout(state: Mapping[str, Tensor], layout: Layout) -> StateDict:
    """Give our parameters their names, and the head its pixel order, in a layout.

    Args:
        state: Ours, named ``encoder.…`` and, if there is one, ``decoder.…``.
        layout: The names to give.

    Raises:
        ValueError: If a parameter has no place there.
    """
    written: StateDict = {}
    for ours, value in state.items():
        try:
            theirs = layout(ours)
        except KeyError:
            raise ValueError(
                f"cannot rename {ours}: got a parameter that the format has no place for; "
                "expected those of a plain encoder (and of a MAE's decoder)"
            ) from None
        if ours.startswith("decoder.head."):
            value = _channels_last(value)
        written |= zip(theirs, (part.clone() for part in value.chunk(len(theirs))), strict=True)
    return written


def read_layout(theirs: Mapping[str, Tensor], layout: Layout, names: Iterable[str]) -> StateDict:
    """Undo :func:`write_layout`.

    Args:
        theirs: Parameters as they are named elsewhere.
        layout: The layout that they are in.
        names: Our names of what is wanted.

    Raises:
        ValueError: If one is missing, or something is left over; the line names it.
    """
    rest, state = dict(theirs), {}
    for ours in names:
        parts = layout(ours)
        if missing := [part for part in parts if part not in rest]:
            raise ValueError(f"{missing[0]}: got no such parameter; expected it beside the others of a MAE")
        value = torch.cat([rest.pop(part) for part in parts]) if len(parts) > 1 else rest.pop(parts[0])
        state[ours] = _channels_first(value) if ours.startswith("decoder.head.") else value
    if rest:
        raise ValueError(
            f"{next(iter(rest))}: got a parameter that a MAE in pre-training does not have; expected its "
            "names alone (a classifier that was fine-tuned is no starting point)"
        )
    return state


def _block_parameters(side: str, depth: int) -> list[str]:
    return [
        f"{side}.blocks.{block}.{module}.{end}"
        for block in range(depth)
        for module in _BLOCK
        for end in ("weight", "bias")
    ]


def _hugging_face(name: str, outside: Mapping[str, str], blocks: str, attention: str) -> list[str]:
    match = re.fullmatch(r"(.+?)(\.weight|\.bias|)", name)
    stem, end = (match[1], match[2]) if match else (name, "")
    inside = re.fullmatch(r"(layers\.\d+\.)?blocks\.(\d+)\.(.+)", stem)
    if inside is None:
        return [outside[stem] + end]
    block = f"{blocks.format(inside[1] or '')}.{inside[2]}"
    if inside[3] == "attn.qkv":
        return [f"{block}.{attention}.{part}{end}" for part in ("query", "key", "value")]
    return [f"{block}.{_HF_BLOCK[inside[3]]}{end}"]


def _channels_last(head: Tensor) -> Tensor:
    """Reorder the rows of the decoder's head: ours predict (channel, y, x), theirs (y, x, channel)."""
    side = _patch_side(head)
    return head.unflatten(0, (3, side, side)).movedim(0, 2).flatten(0, 2)


def _channels_first(head: Tensor) -> Tensor:
    side = _patch_side(head)
    return head.unflatten(0, (side, side, 3)).movedim(2, 0).flatten(0, 2)


def _patch_side(head: Tensor) -> int:
    side = math.isqrt(head.shape[0] // 3)
    if 3 * side**2 != head.shape[0]:
        raise ValueError(
            f"got a decoder that predicts {head.shape[0]} values for a patch; expected 3 * side**2"
        )
    return side
