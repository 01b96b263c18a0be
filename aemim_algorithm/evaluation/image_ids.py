"""Lists of image names: the part of a set that a benchmark uses, such as ARES-Bench's 5,000 of ImageNet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath

__all__ = ["read_ids", "select"]


def read_ids(path: str | Path) -> list[str]:
    """Read a list of image names.

    Args:
        path: A text file; the first word of each line is a name, as lists often go on with a label.
            Empty lines and lines that start with # are left out.

    Returns:
        The names, in the file's order.

    Raises:
        ValueError: There is no such file, it is empty, or it is no text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as a list of image names: {error}") from error
    names = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    if not names:
        raise ValueError(f"{path} names no images: expected one a line")
    return names


def select(ids: Sequence[str], only: Sequence[str], *, where: str) -> list[int]:
    """Positions of named images.

    Args:
        ids: Names of all images of a set, paths within it.
        only: Names to keep: such a path, or a file's name alone where that is the name of one image only.
        where: What a message calls the set.

    Returns:
        The positions in increasing order.

    Raises:
        ValueError: A name is unknown, stands for several images, or an image is named twice.
    """
    positions = {name: position for position, name in enumerate(ids)}
    files = Counter(PurePosixPath(name).name for name in ids)
    by_file = {PurePosixPath(name).name: position for name, position in positions.items()}
    found = [positions.get(name, by_file.get(name) if files[name] == 1 else None) for name in only]
    missing = [name for name, position in zip(only, found, strict=True) if position is None]
    if missing:
        several = files[missing[0]] > 1
        reason = "is the name of several images: give its path" if several else "is not there"
        raise ValueError(
            f"{where}: {len(missing)} of {len(only)} named images, first {missing[0]!r}: {reason}"
        )
    kept = sorted(position for position in found if position is not None)
    twice = next((a for a, b in pairwise(kept) if a == b), None)
    if twice is not None:
        raise ValueError(f"{where}: {ids[twice]!r} is named twice: an image counts once")
    return kept
