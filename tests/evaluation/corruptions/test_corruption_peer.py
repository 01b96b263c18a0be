"""Against imagecorruptions-imaug, an independent port of the official script, where its definitions agree.

Both draw from one legacy generator in the same order, so random corruptions are compared pixel by pixel. Not
compared: elastic_transform (another corruption there), frost (enlarged photographs, and six of them) and glass
(compiled for ten seconds; compared with a plain loop instead). Zoom and snow cut parts from a corner there, not
from the middle.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from corruption_photos import photo
from PIL import Image

from aemim_algorithm.evaluation.corruptions import SEVERITIES, apply

peer = pytest.importorskip("imagecorruptions.corruptions")


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    state = np.random.get_state()
    yield
    np.random.set_state(state)


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("gaussian_noise", 0),
        ("shot_noise", 0),
        ("defocus_blur", 1),
        ("motion_blur", 1),  # the peer cuts fractions off where ImageMagick rounds
        ("fog", 1),
        ("brightness", 0),
        ("contrast", 0),
        ("jpeg_compression", 0),
    ],
)
@pytest.mark.parametrize("picture", ["astronaut", "coffee"])
def test_same_pixels(name: str, levels: int, picture: str) -> None:
    image = photo(picture, 64, 64)
    for severity in SEVERITIES:
        np.random.seed(severity)
        corrupted: Any = getattr(peer, name)(Image.fromarray(image), severity)
        theirs = np.asarray(corrupted).astype(np.uint8)
        ours = apply._corrupt(image, name, severity, np.random.RandomState(severity), "imagenet")
        assert np.abs(ours.astype(int) - theirs).max() <= levels


def test_same_impulses() -> None:
    image = photo()
    for severity in SEVERITIES:
        theirs: Any = peer.impulse_noise(Image.fromarray(image), severity, seed=severity)
        ours = apply.corrupt(image, "impulse_noise", severity, seed=severity)
        assert np.array_equal(ours, np.asarray(theirs).astype(np.uint8))


@pytest.mark.parametrize("name", ["zoom_blur", "snow", "pixelate"])
def test_same_distance_to_the_image(name: str) -> None:
    images = [photo(picture, 96, 96) for picture in ("astronaut", "coffee", "chelsea", "rocket")]
    for severity in (1, 3, 5):
        np.random.seed(severity)
        theirs = [np.uint8(getattr(peer, name)(Image.fromarray(image), severity)) for image in images]
        ours = [apply.corrupt(image, name, severity, seed=7) for image in images]
        distances = [np.abs(np.array(parts).astype(int) - images).mean() for parts in (ours, theirs)]
        assert distances[0] == pytest.approx(distances[1], rel=0.12 if name == "snow" else 0.05)
