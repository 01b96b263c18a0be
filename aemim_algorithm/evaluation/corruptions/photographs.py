"""The photographs of frost that the authors of ImageNet-C lay over images.

The package imagecorruptions-imaug ships them, byte for byte. Its files are read where they lie and it is
not imported, since that would need OpenCV and numba.
"""

from __future__ import annotations

import importlib.metadata
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["FROST_FILES", "frost_photograph"]

_PACKAGE = "imagecorruptions-imaug"

# The official script draws one of the first five of its six files.
FROST_FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")


@lru_cache(maxsize=2 * len(FROST_FILES))
def frost_photograph(number: int, *, every: int = 1) -> np.ndarray:
    """One of the photographs of frost.

    Args:
        number: From 0 to 4.
        every: Takes each ``every``-th pixel, which is what the official bilinear resize by 1/5 comes to.

    Returns:
        Shape (height, width, 3), uint8, RGB, not to be written to.

    Raises:
        ValueError: The package that holds the photographs is not installed, or lacks one.
    """
    with Image.open(_folder() / FROST_FILES[number]) as image:
        photograph = np.array(image.convert("RGB"))
    photograph = np.ascontiguousarray(photograph[every // 2 :: every, every // 2 :: every])
    photograph.flags.writeable = False
    return photograph


def _folder() -> Path:
    try:
        files = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        files = None
    folder = Path(str(files.locate_file("imagecorruptions/frost"))) if files else None
    if folder is None or not all((folder / name).is_file() for name in FROST_FILES):
        raise ValueError(
            "frost: the official photographs of frost were not found: install them with "
            f"`pip install --no-deps {_PACKAGE}==1.1.5`, or leave frost out"
        )
    return folder
