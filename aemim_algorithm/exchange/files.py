"""Reading weights, and writing them whole or not at all."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "UntrustedError",
    "few",
    "model_state",
    "read_content",
    "read_encoder",
    "read_weights",
    "require_file_name",
    "require_fit",
    "require_folder_name",
    "write_file",
    "write_folder",
]

StateDict = dict[str, Tensor]

# What Hugging Face calls the weights in a folder, the safer one first.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class UntrustedError(ValueError):
    """A file that can only be read by running what it says, and nobody has allowed that."""


def model_state(source: str | Path | Mapping[str, Tensor] | nn.Module) -> Mapping[str, Tensor]:
    """The state dict of a model, of a mapping that is one, or of a Composer checkpoint.

    Raises:
        ValueError: If a file is no Composer checkpoint.
    """
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    if not path.is_file():
        kind = "a folder (a sharded checkpoint?)" if path.is_dir() else "no such file"
        raise ValueError(f"cannot export {path}: {kind}; expected one Composer checkpoint file")
    checkpoint = _load_checkpoint(path)
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


def read_weights(path: str | Path, *, trust: bool = False) -> StateDict:
    """Read weights: a file of tensors, bare or under ``model``, a Hugging Face folder, Composer's checkpoint.

    Args:
        path: ``.pth`` or ``.pt`` as torch writes it, ``.safetensors``, or a folder with one of them.
        trust: Whether a pickle may hold more than tensors, as Composer's always do. **Reading such a file
            can run code.**

    Raises:
        UntrustedError: If the file needs trust that was not given.
        ValueError: If there are no weights.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in _WEIGHTS if (path / name).is_file()]
        if not found:
            raise ValueError(f"cannot import {path}: a folder without {' or '.join(_WEIGHTS)}")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"cannot import {path}: no such file; expected weights as a file or a folder")
    content = _read(path, trust=trust)
    state = content.get("model", content) if isinstance(content, Mapping) else None
    if isinstance(state, Mapping) and isinstance(state.get("state"), Mapping):
        state = state["state"].get("model")  # Composer's own place for it
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"cannot import {path}: it holds no state dict; expected named tensors, bare or under 'model'"
        )
    return dict(state)


def read_encoder(path: str | Path) -> StateDict:
    """Read an ``encoder.pt``, or other weights that hold nothing but tensors.

    Raises:
        ValueError: If there are no weights; of a checkpoint, the line says what to make of it.
    """
    try:
        return read_weights(path)
    except UntrustedError as error:
        raise ValueError(f"{path} is no encoder.pt: write one with `aemim export` first") from error


def read_content(path: Path, keys: Iterable[str], *, kind: str, expected: str) -> dict[str, Any]:
    """Read a file of `write_file` that holds more than weights; no code is run.

    Args:
        path: The file.
        keys: What it has to hold.
        kind: What a message calls it, such as ``"classifier"``.
        expected: What a message says is expected, such as ``"the classifier.pt of `aemim finetune`"``.

    Raises:
        ValueError: If there is no such file, or it is another one.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected {expected}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is none can make the unpickler raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: does not read as a {kind} ({reason}); expected {expected}") from error
    if not isinstance(content, dict) or (missing := [key for key in keys if key not in content]):
        lacks = f"lacks {missing[0]!r}" if isinstance(content, dict) else "is no dict"
        raise ValueError(f"{path}: {lacks}; expected {expected}, not an encoder or a checkpoint")
    return content


def require_fit(module: nn.Module, state: Mapping[str, Tensor], *, whose: str) -> None:
    """Refuse a state dict that does not fit a module.

    Args:
        module: Where it is to be loaded.
        state: Every parameter and persistent buffer of ``module``, and nothing else.
        whose: What the state is called in the message.

    Raises:
        ValueError: If a name is missing or left over, or a shape differs; the line names it.
    """
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for name in [*shapes, *state]:
        got = tuple(state[name].shape) if name in state else "nothing"
        expected = shapes.get(name, "nothing")
        if got != expected:
            raise ValueError(
                f"{whose} does not fit {type(module).__name__}: {name}: got {got}, expected {expected}; "
                "name the model that it was trained as, with the sizes that it had"
            )


def write_file(content: object, out: Path) -> None:
    """Save with ``torch.save``; the file appears whole or not at all.

    Raises:
        ValueError: If a folder of that name exists.
        OSError: If it cannot be written; an older file of that name is left as it was.
    """
    require_file_name(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(out)
    try:
        # In memory first: on a full disk torch's own writer raises a RuntimeError that says nothing.
        buffer = io.BytesIO()
        torch.save(content, buffer)
        partial.write_bytes(buffer.getbuffer())
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def write_folder(save: Callable[[Path], object], out: Path) -> None:
    """Let ``save`` fill a folder; it appears whole or not at all.

    Args:
        save: Called with the folder to fill.
        out: Its final name. An older one is replaced if it is empty or holds a ``config.json``.

    Raises:
        ValueError: If ``out`` is a file or a folder of something else.
        OSError: If it cannot be written; an older folder of that name is left as it was.
    """
    require_folder_name(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, old = _partial(out), _partial(out).with_suffix(".old")
    try:
        partial.mkdir()
        save(partial)
        if out.exists():
            os.replace(out, old)  # a rename cannot replace a folder that is not empty
        os.replace(partial, out)
    finally:
        if old.exists() and not out.exists():
            os.replace(old, out)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def require_file_name(out: Path) -> None:
    """Refuse the name of a folder where a file is to be written."""
    if out.is_dir():
        raise ValueError(f"got a folder as output, {out}; expected the name of a file to write")


def require_folder_name(out: Path) -> None:
    """Refuse a name where writing a folder would destroy something else."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"got a file as output, {out}; expected the name of a folder to write")
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise ValueError(
            f"got {out} as output, a folder with other things; expected a new one, or an earlier export"
        )


def few(names: Iterable[str]) -> str:
    """The first names of many."""
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "") if names else "none"


def _partial(out: Path) -> Path:
    # Beside the target, because a rename is atomic only within one file system.
    return out.with_name(f".{out.name}.{os.getpid()}.partial")


def _load_checkpoint(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # a file that is none can make the unpickler raise anything
        raise ValueError(
            f"cannot export {path}: it does not read as a checkpoint ({_reason(error)}); "
            "expected one Composer checkpoint file"
        ) from error


def _read(path: Path, *, trust: bool) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # Training code often leaves its arguments beside the weights; a Namespace runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:  # a file that is none can make the unpickler raise anything
        other = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and other:
            raise UntrustedError(
                f"cannot import {path}: it holds more than tensors ({other[1]}), and reading that can run "
                "code; if you trust who made it, allow it with --trust (trust=True)"
            ) from error
        raise ValueError(
            f"cannot import {path}: it does not read as weights ({_reason(error)}); "
            "expected a file as torch or safetensors write it"
        ) from error


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
