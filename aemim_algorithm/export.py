"""The trained encoder as a file that a plain timm model loads with ``strict=True``.

What pre-training needed and fine-tuning does not is dropped: the decoder and the adversarial
adapters. What stays are the clean parameters under timm's own names (paper: ψ^e ∪ φ_c^e).
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FORMATS", "encoder_state", "export_encoder"]

_PREFIX = "encoder."
# Keys that every timm ViT has; without them "encoder." is another kind of encoder.
_TIMM_KEYS = ("patch_embed.proj.weight", "pos_embed", "norm.weight")

StateDict = dict[str, Tensor]


def export_encoder(
    source: str | Path | Mapping[str, Tensor] | nn.Module,
    out: str | Path,
    *,
    format: str = "timm",
) -> StateDict:
    """Write the clean encoder of a pre-trained model as a plain state dict.

    The file loads with ``torch.load(out, weights_only=True)``. It appears whole or not at all.

    Args:
        source: A Composer checkpoint, the state dict of a model, or the model. **A checkpoint is
            a pickle: reading it can run code, so open only one that you trust.** Composer stores
            more than tensors in it, so ``weights_only=True`` cannot read it.
        out: The file to write; its folder is made if missing.
        format: Names of the parameters, a key of ``FORMATS``.

    Returns:
        What was written, on the CPU.

    Raises:
        ValueError: If the format is unknown, or the source is no checkpoint or holds no such
            encoder. Nothing is written then.
        OSError: If the file cannot be written; an older file of that name is left as it was.
    """
    if format not in FORMATS:
        raise ValueError(f"got format={format!r}; expected one of {', '.join(sorted(FORMATS))}")
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"got a folder as output, {out}; expected the name of a file to write")
    exported = FORMATS[format](encoder_state(_model_state(source)))
    _write_atomically(exported, out)
    return exported


def encoder_state(state: Mapping[str, Tensor]) -> StateDict:
    """The clean encoder's parameters and buffers, without their prefix.

    Args:
        state: State dict of a model whose encoder is its submodule ``encoder``.

    Returns:
        Copies on the CPU; independent of the model, so that training may go on.

    Raises:
        ValueError: If there is no encoder, or its tensors are shards of a distributed model.
    """
    found = {
        key.removeprefix(_PREFIX): value
        for key, value in state.items()
        if key.startswith(_PREFIX) and "adversarial" not in key
    }
    if not found:
        raise ValueError(
            f"found no encoder among {len(state)} parameters ({_few(state)}); "
            f"expected names that start with {_PREFIX!r}, as in the models of this package"
        )
    # A shard is a DTensor; asking for the whole would need every rank, which a file write is not.
    sharded = [key for key, value in found.items() if hasattr(value, "full_tensor")]
    if sharded:
        raise ValueError(
            f"got a sharded encoder ({_few(sharded)}); expected whole tensors: save a checkpoint "
            "with state_dict_type='full' and export that"
        )
    return {key: value.detach().cpu().clone() for key, value in found.items()}


def _timm(state: StateDict) -> StateDict:
    missing = [key for key in _TIMM_KEYS if key not in state]
    if missing:
        raise ValueError(
            f"the encoder lacks {', '.join(missing)} (it has {_few(state)}); "
            "expected the parameters of a timm VisionTransformer"
        )
    return state


FORMATS: dict[str, Callable[[StateDict], StateDict]] = {"timm": _timm}
"""Export formats by name; each maps the encoder's state to the names of another library."""


def _model_state(source: str | Path | Mapping[str, Tensor] | nn.Module) -> Mapping[str, Tensor]:
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    if not path.is_file():
        kind = "a folder (a sharded checkpoint?)" if path.is_dir() else "no such file"
        raise ValueError(f"cannot export {path}: {kind}; expected one Composer checkpoint file")
    checkpoint = _load(path)
    try:
        state = checkpoint["state"]["model"]
    except (KeyError, TypeError, IndexError):
        state = None
    if not isinstance(state, Mapping):
        raise ValueError(
            f"cannot export {path}: it holds no model under ['state']['model']; "
            "expected a Composer checkpoint, such as ep1-ba90-rank0.pt"
        )
    return state


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # a file that is none can make the unpickler raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"cannot export {path}: it does not read as a checkpoint ({reason}); "
            "expected one Composer checkpoint file"
        ) from error


def _write_atomically(state: StateDict, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, because a rename is atomic only within one file system.
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        # In memory first: on a full disk torch's own writer raises a RuntimeError that says nothing.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        partial.write_bytes(buffer.getbuffer())
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def _few(names: Mapping[str, Any] | list[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "") if names else "none"
