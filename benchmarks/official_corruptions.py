"""Run the corruptions of ImageNet-C's authors from a clone of their repository, to measure ours beside them.

Their scripts start to write a data set when they are imported, and want libraries of 2018. So the text of
their functions alone is run, with today's names of what they call. ImageMagick's motion blur is replaced by
the port of it in imagecorruptions-imaug, rounded to whole grey levels as ImageMagick does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import chdir
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import skimage.color
from PIL import Image
from scipy.ndimage import map_coordinates, zoom
from skimage.filters import gaussian
from skimage.util import random_noise

__all__ = ["OfficialCorruptions"]

_SCRIPTS = {"imagenet": ("make_imagenet_c.py", 224), "cifar": ("make_cifar_c.py", 32)}
_FIRST, _LAST = "def disk(", "# /////////////// End Distortions"
_WAND = ("# Tell Python about the C method", "# modification of https")
_TODAY = {
    "np.float_": "np.float64",
    "multichannel=True": "channel_axis=-1",
    "np.fromstring": "np.frombuffer",
    "map_coordinates(image, indices": "map_coordinates(image, np.array(indices)",
}


class OfficialCorruptions:
    """The authors' corruptions of one table; they draw from NumPy's global generator.

    Args:
        clone: Of github.com/hendrycks/robustness.
        table: "imagenet", for images of 224 pixels, or "cifar", for 32.

    Raises:
        FileNotFoundError: It is no such clone.
    """

    def __init__(self, clone: Path, table: str) -> None:
        script, self.size = _SCRIPTS[table]
        self.folder = clone / "ImageNet-C" / "create_c"
        text = (self.folder / script).read_text(encoding="utf-8")
        text = text[text.index(_FIRST) : text.index(_LAST)]
        text = text[: text.index(_WAND[0])] + text[text.index(_WAND[1]) :]
        for old, new in _TODAY.items():
            text = text.replace(old, new)
        self.functions = _libraries()
        exec(compile(text, script, "exec"), self.functions)

    def __call__(self, image: np.ndarray, name: str, severity: int, *, seed: int) -> np.ndarray:
        """Corrupt one image of shape (size, size, 3), uint8, after setting the global seed."""
        function: Callable[..., Any] = self.functions[name]
        np.random.seed(seed)
        with chdir(self.folder), warnings.catch_warnings():  # frost reads from the working directory
            warnings.simplefilter("ignore")
            return np.asarray(function(Image.fromarray(image), severity)).astype(np.uint8)


def _libraries() -> dict[str, Any]:
    import cv2

    def seeded_noise(image: np.ndarray, mode: str, amount: float) -> np.ndarray:
        return random_noise(image, mode=mode, amount=amount, rng=np.random.randint(2**31))

    return {
        "np": np,
        "cv2": cv2,
        "sk": SimpleNamespace(color=skimage.color, util=SimpleNamespace(random_noise=seeded_noise)),
        "gaussian": gaussian,
        "scizoom": zoom,
        "map_coordinates": map_coordinates,
        "PILImage": Image,
        "BytesIO": BytesIO,
        "MotionImage": _MotionImage,
    }


class _MotionImage:
    """Stands in for Wand's image of one PNG."""

    def __init__(self, *, blob: bytes) -> None:
        self.pixels = np.asarray(Image.open(BytesIO(blob)), np.float32)

    def motion_blur(self, *, radius: int, sigma: float, angle: float) -> None:
        from imagecorruptions.corruptions import _motion_blur

        self.pixels = _motion_blur(self.pixels, radius, sigma, angle)

    def make_blob(self) -> bytes:
        file = BytesIO()
        Image.fromarray(np.rint(np.clip(self.pixels, 0, 255)).astype(np.uint8)).save(file, "PNG")
        return file.getvalue()
