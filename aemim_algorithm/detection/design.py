"""What a detector is built from, and the one file that a trained one is kept in: ``detector.pt``.

The file holds all that detecting needs: weights, architecture, how images are resized and normalised, and
what the categories are called. Reading it runs no code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN

from aemim_algorithm.detection.backbone import ViTBackbone, build_encoder
from aemim_algorithm.detection.model import Heads, View, build_detector
from aemim_algorithm.exchange.files import read_content, require_fit, write_file
from aemim_algorithm.models.classifier import Architecture

__all__ = ["FILE_NAME", "Design", "TrainedDetector", "read_detector", "save_detector"]

FILE_NAME = "detector.pt"
_EXPECTED = f"the {FILE_NAME} that `aemim detect` writes"
_KEYS = ("model", "encoder", "window", "global_blocks", "heads", "view", "categories")


@dataclass(frozen=True)
class Design:
    """A detector but for its weights and categories.

    Attributes:
        encoder: Of :func:`~aemim_algorithm.models.classifier.architecture_of`, at the image size that the
            position embeddings are for.
        window: Largest side of an attention window, in patches; ``None``: there are none.
        global_blocks: How many blocks attend to everything.
        heads: Sizes of torchvision's part.
        view: What of an image it sees.
    """

    encoder: Architecture
    window: int | None
    global_blocks: int
    heads: Heads
    view: View

    def build(self, num_classes: int, *, drop_path: float = 0.0, **options: bool) -> MaskRCNN:
        """The network with random weights.

        Args:
            num_classes: Number of categories.
            drop_path: Rate of stochastic depth in the last block.
            **options: ``frozen`` and ``recompute`` of `ViTBackbone`.

        Raises:
            ValueError: It cannot be built; the line says why.
        """
        backbone = ViTBackbone(
            build_encoder(self.encoder, drop_path=drop_path),
            window=self.window,
            global_blocks=self.global_blocks,
            channels=self.heads.channels,
            **options,
        )
        return build_detector(backbone, num_classes=num_classes, heads=self.heads, view=self.view)


@dataclass(frozen=True)
class TrainedDetector:
    """A detector from its file.

    Attributes:
        network: Maps a list of images, float in [0, 1], shape (3, height, width), to their detections; on
            the CPU and in evaluation mode.
        design: What it was built from.
        categories: Id and name of each, in the order of the labels, which begin at 1.
    """

    network: MaskRCNN
    design: Design
    categories: tuple[tuple[int, str], ...]


def save_detector(
    path: str | Path, *, design: Design, state: Mapping[str, Tensor], categories: Sequence[tuple[int, str]]
) -> None:
    """Write a detector, whole or not at all; ``torch.load(path, weights_only=True)`` reads it.

    Args:
        path: The file.
        design: What it was built from.
        state: State dict of the network.
        categories: Id and name of each, in the order of the labels.

    Raises:
        OSError: If it cannot be written; an older file is left as it was.
    """
    described = asdict(design)
    content = {
        "model": {name: value.detach().cpu() for name, value in state.items()},
        **described,
        "categories": [(int(identity), str(name)) for identity, name in categories],
    }
    write_file(content, Path(path))


def read_detector(path: str | Path) -> TrainedDetector:
    """Read what `save_detector` wrote.

    Args:
        path: The file, such as ``runs/coco_vit_base/detector.pt``.

    Returns:
        The detector.

    Raises:
        ValueError: If there is no such file, it is no detector, or its weights do not fit.
    """
    content = read_content(Path(path), _KEYS, kind="detector", expected=_EXPECTED)
    design = Design(
        encoder=content["encoder"],
        window=content["window"],
        global_blocks=content["global_blocks"],
        heads=Heads(**content["heads"]),
        view=View(**content["view"]),
    )
    with torch.random.fork_rng(devices=[]):  # the caller's generator is left as it was
        network = design.build(len(content["categories"]))
    require_fit(network, content["model"], whose=f"the state in {path}")
    network.load_state_dict(content["model"])
    return TrainedDetector(network.eval(), design, tuple(map(tuple, content["categories"])))
