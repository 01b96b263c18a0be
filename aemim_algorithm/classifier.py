"""A trained image classifier, and the one file that it is kept in: ``classifier.pt``.

The file holds all that evaluating needs: the weights, timm's name and arguments of the architecture, how
images are normalised and cropped, and what the classes are called. Reading it runs no code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from aemim_algorithm.exchange.files import read_content, require_fit, write_file

__all__ = ["FILE_NAME", "Classifier", "read_classifier", "save_classifier"]

FILE_NAME = "classifier.pt"
_EXPECTED = f"the {FILE_NAME} that `aemim finetune` writes"
_KEYS = ("model", "architecture", "image_size", "mean", "std", "classes", "crop_fraction", "interpolation")


@dataclass(frozen=True)
class Classifier:
    """A classifier and the view of an image that it is to be given.

    Attributes:
        model: Maps normalised images, shape (batch, 3, image_size, image_size), float32, to logits, shape
            (batch, classes).
        image_size: Side of the images, in pixels.
        mean: Of the pixels in [0, 1], per channel.
        std: Of the pixels in [0, 1], per channel.
        classes: Name of each class, in the order of the logits; ``None`` if nobody knows them.
        crop_fraction: Side of the evaluation crop over the short side of the image it is cut from.
        interpolation: Of that image: ``bicubic``, ``bilinear``, ...
        name: What reports call it.
        crop_mode: What is resized before the crop: the short side (``center``), both sides (``squash``), or
            the long side (``border``), as in timm; a run's own is ``center``.
    """

    model: nn.Module
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: tuple[str, ...] | None
    crop_fraction: float = 1.0
    interpolation: str = "bicubic"
    name: str = "classifier"
    crop_mode: str = "center"


def save_classifier(
    path: str | Path,
    *,
    state: Mapping[str, Tensor],
    architecture: Mapping[str, Any],
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    classes: Sequence[str] | None,
    crop_fraction: float,
    interpolation: str = "bicubic",
) -> None:
    """Write a classifier, whole or not at all; ``torch.load(path, weights_only=True)`` reads it.

    Args:
        path: The file.
        state: State dict of the model that ``architecture`` names.
        architecture: ``{"name": timm's name, "kwargs": arguments of timm.create_model}``.
        image_size: As for the others, see `Classifier`.
        mean: See `Classifier`.
        std: See `Classifier`.
        classes: See `Classifier`.
        crop_fraction: See `Classifier`.
        interpolation: See `Classifier`.

    Raises:
        OSError: If it cannot be written; an older file is left as it was.
    """
    content = {
        "model": {name: value.detach().cpu() for name, value in state.items()},
        "architecture": {"name": str(architecture["name"]), "kwargs": dict(architecture["kwargs"])},
        "image_size": int(image_size),
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "classes": None if classes is None else [str(name) for name in classes],
        "crop_fraction": float(crop_fraction),
        "interpolation": interpolation,
    }
    write_file(content, Path(path))


def read_classifier(path: str | Path) -> Classifier:
    """Read what `save_classifier` wrote.

    Args:
        path: The file, such as ``runs/cifar10_tiny/classifier.pt``.

    Returns:
        The classifier, on the CPU and in evaluation mode; its name is the folder's and the file's.

    Raises:
        ValueError: If there is no such file, it is no classifier, or its weights do not fit.
    """
    path = Path(path)
    content = read_content(path, _KEYS, kind="classifier", expected=_EXPECTED)
    model = _build(path, content["architecture"])
    require_fit(model, content["model"], whose=f"the state in {path}")
    model.load_state_dict(content["model"])
    names = content["classes"]
    return Classifier(
        model=model.eval(),
        image_size=content["image_size"],
        mean=tuple(content["mean"]),
        std=tuple(content["std"]),
        classes=None if names is None else tuple(names),
        crop_fraction=content["crop_fraction"],
        interpolation=content["interpolation"],
        name=f"{path.absolute().parent.name}/{path.name}",
    )


def _build(path: Path, architecture: Mapping[str, Any]) -> nn.Module:
    """An untrained model; the caller's generators are left as they were."""
    try:
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = timm.create_model(architecture["name"], **architecture["kwargs"])
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: timm cannot build its architecture ({reason})") from error
    return model
