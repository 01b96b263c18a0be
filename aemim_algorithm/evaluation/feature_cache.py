"""Features of frozen encoders on disk, so that a second probe of the same encoder and data takes seconds."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from aemim_algorithm.data.index import files_of, hash_of, read_index
from aemim_algorithm.evaluation.features import check_features
from aemim_algorithm.exchange.files import write_file

__all__ = ["Split", "cached_split", "digest_of", "file_digest", "shards_digest", "structure_digest"]

_CHUNK = 2**20
_DIGITS = 16  # of the digest in a file's name


@dataclass(frozen=True)
class Split:
    """Features and labels of one half of a data set.

    Attributes:
        features: Shape (n, dim), float16 or float32.
        labels: Shape (n,), int64.
    """

    features: Tensor
    labels: Tensor


def cached_split(
    folder: Path, name: str, key: str, compute: Callable[[], Split], *, dtype: torch.dtype
) -> tuple[Split, bool]:
    """Read features, or compute and keep them.

    Args:
        folder: Where they are kept; made if need be.
        name: How the file's name begins.
        key: Digest of all that decides the features, see :func:`digest_of`.
        compute: Called where the features are not there yet.
        dtype: What they are kept as, float16 or float32.

    Returns:
        The features, the same whether they were read or computed, and whether they were read.

    Raises:
        ValueError: If the features are not finite in ``dtype``; nothing is kept then.
        OSError: If they cannot be written.
    """
    path = folder / f"{name}-{key[:_DIGITS]}.pt"
    if (found := _read(path, key)) is not None:
        return found, True
    computed = compute()
    split = Split(computed.features.to(dtype), computed.labels)
    check_features(split.features, split.labels, split=name)
    write_file({"key": key, "features": split.features, "labels": split.labels}, path)
    return split, False


def digest_of(*parts: object) -> str:
    """Digest of values, in their order, as hexadecimal digits."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Digest of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def shards_digest(folder: Path) -> str:
    """Digest of shards: of their index, which holds their hashes, and of the bytes of those without one.

    Args:
        folder: Folder of the shards.

    Returns:
        Hexadecimal digits.

    Raises:
        ValueError: If there is no sound index.
    """
    files = [file for shard in read_index(folder) for file in files_of(shard)]
    bare = [folder / file["basename"] for file in files if hash_of(file.get("hashes")) is None]
    return digest_of(
        file_digest(folder / "index.json"), [file_digest(path) for path in bare if path.is_file()]
    )


def structure_digest(module: nn.Module) -> str:
    """Digest of what a state dict does not tell of a module: its layers, and their numbers and switches.

    The number of heads is such a number: other heads, other features from the same weights.
    """
    layers = [
        (
            name,
            type(layer).__qualname__,
            [(key, value) for key, value in vars(layer).items() if _plain(value)],
        )
        for name, layer in module.named_modules()
    ]
    return digest_of(layers)


def _plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _read(path: Path, key: str) -> Split | None:
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["key"] == key:
            return Split(content["features"], content["labels"])
        reason = "it is of something else"
    except Exception as error:  # changed bytes can make a reader raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    warnings.warn(f"{path} cannot be used ({reason}); the features are computed again", stacklevel=4)
    return None
