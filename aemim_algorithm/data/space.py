"""Free space on disks, asked for before it is needed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

__all__ = ["existing_parent", "free_bytes", "in_units"]


def free_bytes(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be made."""
    return shutil.disk_usage(existing_parent(folder)).free


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    return path if path.exists() else existing_parent(path.parent)


def in_units(count: float) -> str:
    """Bytes as people read them: ``1.2 GiB``."""
    if count < 1024:
        return f"{count:,.0f} bytes"
    units = ("KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(count, 1024)), len(units))
    return f"{count / 1024**power:,.1f} {units[power - 1]}"
