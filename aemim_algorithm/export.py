"""The trained encoder as others take it: timm, Hugging Face, the original MAE's code, a BEiT.

What pre-training needed and fine-tuning does not is dropped: the adversarial adapters always, the
decoder unless it is asked for, the mask token. What stays are the clean parameters (paper: ψ^e ∪ φ_c^e).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from aemim_algorithm.exchange.files import few, model_state, require_file_name, write_file
from aemim_algorithm.exchange.huggingface import export_huggingface
from aemim_algorithm.exchange.layouts import mae_layout, write_layout
from aemim_algorithm.exchange.trained import Trained, clean_part, resized
from aemim_algorithm.exchange.wrapped import export_wrapped, wrapped_model

__all__ = ["FORMATS", "encoder_state", "export_encoder", "native_format"]

# Keys of every timm ViT or Swin; without them "encoder." is another kind of encoder.
_PATCHES = ("patch_embed.proj.weight", "norm.weight")
_VIT = ("blocks.0.attn.qkv.weight", "pos_embed")
_SWIN = ("layers.0.blocks.0.attn.relative_position_bias_table",)
_TOKENIZER = ("blocks.input.weight", "blocks.output.conv.weight")
_MAE_DECODER = ("mask_token", "pos_embed", "embed.weight", "head.weight")

StateDict = dict[str, Tensor]


def export_encoder(
    source: str | Path | Mapping[str, Tensor] | nn.Module,
    out: str | Path,
    *,
    format: str = "timm",
    decoder: bool = False,
    image_size: int | tuple[int, int] | None = None,
    window_size: int | None = None,
    model: nn.Module | None = None,
) -> StateDict:
    """Write the clean encoder of a pre-trained model for another library.

    What is written appears whole or not at all. Formats: ``timm`` is a state dict that a
    ``VisionTransformer`` or ``SwinTransformer`` (``num_classes=0, global_pool=""``) loads strictly;
    ``mae`` the original MAE's names under ``model``; ``huggingface`` a folder for ``from_pretrained`` of
    ``ViTModel`` or ``SwinModel`` (``add_pooling_layer=False``), or, with the decoder, of
    ``ViTMAEForPreTraining``; a model that is Hugging Face's own, in Composer's ``HuggingFaceModel``,
    becomes what it was: its base model, or all of it; ``tokenizer`` is the encoder of a ``DiscreteVAE``,
    from which a ``BEiT`` takes its targets. Files load with ``torch.load(out, weights_only=True)``.

    Args:
        source: A Composer checkpoint, the state dict of a model, or the model. **A checkpoint is
            a pickle: reading it can run code, so open only one that you trust.** Composer stores
            more than tensors in it, so ``weights_only=True`` cannot read it.
        out: The file or folder to write; the folder around it is made if missing.
        format: A key of ``FORMATS``.
        decoder: Whether the decoder is written as well; ``timm`` has none.
        image_size: Side of the square input, or (height, width), in pixels: position embeddings and
            tables of relative positions are interpolated to it as timm does. ``None`` for as trained.
        window_size: Side of a Swin's windows, in patches. ``None`` for as trained.
        model: A model of the architecture of ``source``, which ``huggingface`` and the two sizes need and
            a checkpoint does not tell; its values do not count. ``source`` itself if that is a model.

    Returns:
        What was written, on the CPU.

    Raises:
        ValueError: If the format is unknown, the source is no checkpoint or holds no such encoder, or
            the format cannot express it. Nothing is written then.
        OSError: If it cannot be written; an older export of that name is left as it was.
    """
    if format not in FORMATS:
        raise ValueError(f"got format={format!r}; expected one of {', '.join(sorted(FORMATS))}")
    if model is None and isinstance(source, nn.Module):
        model = source
    state = model_state(source)
    inner = wrapped_model(model)
    if inner is not None and format == "huggingface" and image_size is window_size is None:
        return export_wrapped(state, inner, Path(out), whole=decoder)
    trained = Trained(encoder_state(state), _mae_decoder(state) if decoder else None, model)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    return FORMATS[format](resized(trained, image_size=size, window_size=window_size), Path(out))


def encoder_state(state: Mapping[str, Tensor]) -> StateDict:
    """The clean encoder's parameters and buffers, without their prefix.

    Args:
        state: State dict of a model whose encoder is its submodule ``encoder``.

    Returns:
        Copies on the CPU; independent of the model, so that training may go on.

    Raises:
        ValueError: If there is no encoder, or its tensors are shards of a distributed model.
    """
    return clean_part(state, "encoder")


def native_format(state: Mapping[str, Tensor]) -> str:
    """The format in which a model of this package is of use without its decoder: a key of ``FORMATS``."""
    return "tokenizer" if all(f"encoder.{key}" in state for key in _TOKENIZER) else "timm"


def _export_timm(trained: Trained, out: Path) -> StateDict:
    require_file_name(out)
    if trained.decoder is not None:
        raise ValueError(
            "got decoder=True for format 'timm'; expected 'mae' or 'huggingface', timm has no decoder"
        )
    _require_known_encoder(trained.encoder)
    state = {key: value for key, value in trained.encoder.items() if key != "mask_token"}
    write_file(state, out)
    return state


def _export_mae(trained: Trained, out: Path) -> StateDict:
    require_file_name(out)
    _require_known_encoder(trained.encoder, swin=False)
    state = write_layout(trained.renameable(), mae_layout)
    write_file({"model": state}, out)
    return state


def _export_tokenizer(trained: Trained, out: Path) -> StateDict:
    require_file_name(out)
    missing = [key for key in _TOKENIZER if key not in trained.encoder]
    if missing:
        raise ValueError(
            f"the encoder lacks {', '.join(missing)} (it has {few(trained.encoder)}); "
            "expected that of a DiscreteVAE"
        )
    write_file(trained.encoder, out)
    return trained.encoder


def _mae_decoder(state: Mapping[str, Tensor]) -> StateDict:
    decoder = clean_part(state, "decoder")
    missing = [key for key in _MAE_DECODER if key not in decoder]
    if missing:
        raise ValueError(
            f"the decoder lacks {', '.join(missing)} (it has {few(decoder)}); "
            "expected that of a MAE: leave out --decoder (decoder=False) for the encoder alone"
        )
    return decoder


def _require_known_encoder(state: StateDict, *, swin: bool = True) -> None:
    kind = _SWIN if swin and _SWIN[0] in state else _VIT
    missing = [key for key in _PATCHES + kind if key not in state]
    if missing:
        raise ValueError(
            f"the encoder lacks {', '.join(missing)} (it has {few(state)}); "
            f"expected the parameters of a timm VisionTransformer{' or SwinTransformer' if swin else ''}"
        )


FORMATS: dict[str, Callable[[Trained, Path], StateDict]] = {
    "timm": _export_timm,
    "huggingface": export_huggingface,
    "mae": _export_mae,
    "tokenizer": _export_tokenizer,
}
"""Export formats by name; each writes a trained model for another library, and returns what it wrote."""
