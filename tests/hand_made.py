"""Sets and classifiers whose right results are known: an image's grey level decides what is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from aemim_algorithm.classifier import Classifier
from aemim_algorithm.evaluation.imagenet_classes import imagenet_synsets


class ByGreyLevel(nn.Module):
    """Looks the logits up in a table by the grey level of the image's first pixel."""

    def __init__(self, table: Mapping[int, Mapping[int, float]], classes: int) -> None:
        super().__init__()
        logits = torch.zeros(256, classes)
        for level, row in table.items():
            for label, value in row.items():
                logits[level, label] = value
        self.register_buffer("logits", logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[(images[:, 0, 0, 0] * 255).round().long()]


def by_grey_level(
    table: Mapping[int, Mapping[int, float]], classes: Sequence[str] | None = None, size: int = 8
) -> Classifier:
    """A classifier; `table` holds the logits that are not 0, by grey level and label."""
    names = imagenet_synsets() if classes is None else tuple(classes)
    return Classifier(
        model=ByGreyLevel(table, len(names)),
        image_size=size,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        classes=names,
        name="by grey level",
    )


def write_grey(root: Path, levels: Mapping[str, int], size: int = 8) -> Path:
    """Images of one grey level each, by their path under the root."""
    for name, level in levels.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), (level,) * 3).save(root / name, format="PNG")
    return root
