"""Photographs to corrupt, and frost of one known colour each instead of the official photographs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aemim_algorithm.data.photos import load_photos
from aemim_algorithm.evaluation.corruptions import photographs

FROST_LEVELS = (40, 80, 120, 160, 200)
FROST_SIDE = 325  # a fifth of it is 65


@pytest.fixture
def frost_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    site = tmp_path / "site"
    folder, about = site / "imagecorruptions" / "frost", site / "imagecorruptions_imaug-1.1.5.dist-info"
    folder.mkdir(parents=True)
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: imagecorruptions-imaug\nVersion: 1.1.5\n")
    for name, level in zip(photographs.FROST_FILES, FROST_LEVELS, strict=True):
        Image.new("RGB", (FROST_SIDE, FROST_SIDE), (level, level, level)).save(folder / name)
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    photographs.frost_photograph.cache_clear()
    yield folder
    photographs.frost_photograph.cache_clear()


_photos = cache(load_photos)


def photo(name: str = "astronaut", height: int = 48, width: int = 48) -> np.ndarray:
    """A thinned-out photograph, shape (height, width, 3), uint8."""
    image = _photos()[name].permute(1, 2, 0).numpy()
    rows = np.linspace(0, image.shape[0] - 1, height).astype(int)
    columns = np.linspace(0, image.shape[1] - 1, width).astype(int)
    return np.ascontiguousarray(image[rows][:, columns])
