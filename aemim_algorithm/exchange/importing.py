"""Published MAE weights, or those of an earlier run, as a starting point for pre-training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from aemim_algorithm.exchange.files import (
    UntrustedError,
    read_weights,
    require_file_name,
    require_fit,
    write_file,
)
from aemim_algorithm.exchange.layouts import (
    Layout,
    hf_vit_layout,
    hf_vit_mae_layout,
    mae_layout,
    mae_parameters,
    read_layout,
)
from aemim_algorithm.exchange.trained import clean_part

__all__ = ["PARTS", "import_checkpoint", "load_start", "require_start"]

StateDict = dict[str, Tensor]

PARTS = ("encoder", "decoder")


def import_checkpoint(
    source: str | Path, out: str | Path, *, model: nn.Module | None = None, trust: bool = False
) -> StateDict:
    """Turn weights into a state dict by our names, for :func:`load_start`.

    Read are the names of the original MAE checkpoints (``mae_pretrain_vit_base.pth``, the encoder
    alone, or with the decoder), Hugging Face's folders of a ViT or a ViTMAE, and with ``trust`` the
    checkpoints that Composer saves of any model of this package, whose adversarial copies are dropped.
    Without a decoder in the file there is none in the result.

    Args:
        source: File or folder.
        out: The file to write.
        model: The model that is to start from them, to check names and shapes against; never changed.
        trust: Whether a pickle may hold more than tensors. **Reading such a file can run code.**

    Returns:
        What was written.

    Raises:
        ValueError: If it does not read, or a name or a shape is wrong. Nothing is written then.
        OSError: If it cannot be written; an older file of that name is left as it was.
    """
    require_file_name(Path(out))
    theirs = read_weights(source, trust=trust)
    try:
        state = _own(theirs) or _renamed(theirs)
        if model is not None:
            parts = _load_parts(model, state, change=False)
            _require_heads(Path(source), model, parts)
    except ValueError as error:
        raise ValueError(f"cannot import {source}: {error}") from error
    write_file({name: value.contiguous().clone() for name, value in state.items()}, Path(out))
    return state


def load_start(model: nn.Module, path: str | Path) -> list[str]:
    """Start a model from a file that :func:`import_checkpoint` wrote; before adapters are added.

    Args:
        model: Changed in place. A decoder that the file does not hold keeps its initialisation.
        path: The file.

    Returns:
        The parts that were loaded: ``encoder``, or ``encoder`` and ``decoder``.

    Raises:
        ValueError: If the file does not fit the model; the model is left as it was.
    """
    return _start(model, path, change=True)


def require_start(model: nn.Module, path: str | Path) -> list[str]:
    """Check what :func:`load_start` would load, without doing it; ``model`` may be on the meta device."""
    return _start(model, path, change=False)


def _start(model: nn.Module, path: str | Path, *, change: bool) -> list[str]:
    try:
        return _load_parts(model, read_weights(path), change=change)
    except UntrustedError as error:
        raise ValueError(
            f"cannot start from {path}: a Composer checkpoint or another pickle is no starting point: "
            "run `aemim import` first"
        ) from error
    except ValueError as error:
        raise ValueError(f"cannot start from {path}: {error}") from error


def _load_parts(model: nn.Module, state: Mapping[str, Tensor], *, change: bool) -> list[str]:
    """Check every part of a state against the model, then load them if ``change``."""
    parts = {part: _part(state, part) for part in PARTS}
    strange = [name for name in state if name.partition(".")[0] not in PARTS]
    if strange or not parts["encoder"]:
        raise ValueError(
            f"{(strange or ['encoder.*'])[0]}: got {'this name' if strange else 'no such name'}; expected "
            "'encoder.…' and 'decoder.…', as aemim import writes them"
        )
    present = {part: values for part, values in parts.items() if values}
    for part, values in present.items():
        require_fit(getattr(model, part, nn.Module()), values, whose=f"its {part}")
    if change:
        for part, values in present.items():
            model.get_submodule(part).load_state_dict(values)
    return list(present)


def _part(state: Mapping[str, Tensor], part: str) -> StateDict:
    prefix = f"{part}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _own(state: Mapping[str, Tensor]) -> StateDict:
    """The clean encoder and decoder of a model of this package; nothing if these are other names."""
    parts = [part for part in PARTS if any(name.startswith(f"{part}.") for name in state)]
    if "encoder" not in parts or _layout_of(state)[0] is not mae_layout:
        return {}
    return {f"{part}.{name}": value for part in parts for name, value in clean_part(state, part).items()}


def _renamed(theirs: Mapping[str, Tensor]) -> StateDict:
    """The parameters of a MAE by our names, from theirs."""
    layout, decoder = _layout_of(theirs)
    depth = _depth(theirs, layout, "encoder")
    decoder_depth = _depth(theirs, layout, "decoder") if decoder else None
    return read_layout(theirs, layout, mae_parameters(depth, decoder_depth))


def _layout_of(theirs: Mapping[str, Tensor]) -> tuple[Layout, bool]:
    """Whose names these are, and whether a decoder is among them."""
    if any(name.startswith("vit.") for name in theirs):
        return hf_vit_mae_layout, any(name.startswith("decoder.") for name in theirs)
    if any(name.startswith("embeddings.") for name in theirs):
        return hf_vit_layout, False
    return mae_layout, any(name.startswith("decoder_") for name in theirs)


def _depth(theirs: Mapping[str, Tensor], layout: Layout, part: str) -> int:
    """Number of blocks, at least one: a file without the first names it as missing."""
    depth = 1
    while layout(f"{part}.blocks.{depth}.norm1.weight")[0] in theirs:
        depth += 1
    return depth


def _require_heads(source: Path, model: nn.Module, parts: Sequence[str]) -> None:
    """Weights do not tell the number of heads, a Hugging Face folder's ``config.json`` does."""
    path = source / "config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    for part, key in zip(PARTS, ("num_attention_heads", "decoder_num_attention_heads"), strict=True):
        if part not in parts:
            continue
        expected = model.get_submodule(f"{part}.blocks.0.attn").num_heads
        if key in config and config[key] != expected:
            raise ValueError(
                f"{key}: got {config[key]}, expected {expected} as the model has; name the model that fits"
            )
