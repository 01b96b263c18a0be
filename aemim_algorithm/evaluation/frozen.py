"""Score frozen encoders on a labelled data set: one pass over the images, two probes on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aemim_algorithm.data.shards import DESCRIPTION
from aemim_algorithm.data.streaming import class_names, evaluation_data
from aemim_algorithm.data.transforms import Normalize
from aemim_algorithm.evaluation.features import Pooling, extract_features
from aemim_algorithm.evaluation.knn import knn_accuracy
from aemim_algorithm.evaluation.linear_probe import linear_probe_accuracy

__all__ = ["encode", "evaluate_encoders", "relabelled", "training_labels"]


def evaluate_encoders(
    encoders: Mapping[str, nn.Module],
    train_local: str | Path,
    test_local: str | Path,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    batch_size: int = 128,
) -> dict[str, dict[str, float]]:
    """Top-1 of k-NN and of a linear probe on the average patch tokens.

    Args:
        encoders: By name, as in :func:`extract_features`, on ``device``.
        train_local: Folder of MDS shards that the probes learn from.
        test_local: Folder of MDS shards that they are scored on.
        image_size: Side of the square images that the encoders see, in pixels.
        mean: Per-channel mean of the normalised input, pixel range [0, 1].
        std: Per-channel standard deviation of the normalised input, pixel range [0, 1].
        device: Where the encoders run.
        batch_size: Images per forward.

    Returns:
        ``{"knn": percent, "linear": percent}`` by the encoder's name.

    Raises:
        ValueError: If an encoder or the data do not fit, or the test images are of other classes.
    """
    labels = training_labels(train_local, test_local)
    options: Any = {
        "image_size": image_size,
        "mean": mean,
        "std": std,
        "device": device,
        "batch_size": batch_size,
    }
    train, train_labels = encode(encoders, train_local, **options)
    test, test_labels = encode(encoders, test_local, **options)
    test_labels = relabelled(test_labels, labels)
    return {
        name: {
            "knn": knn_accuracy(train[name], train_labels, test[name], test_labels),
            "linear": linear_probe_accuracy(train[name], train_labels, test[name], test_labels),
        }
        for name in encoders
    }


def training_labels(train_local: str | Path, test_local: str | Path) -> Tensor | None:
    """The label that each class of the test images has in training, matched by name.

    Args:
        train_local: Folder of the training shards.
        test_local: Folder of the test shards.

    Returns:
        Shape (test classes,), int64; ``None`` where one of the folders does not name its classes: labels
        are taken as they are then.

    Raises:
        ValueError: If a class of the test images is none of the training images'.
    """
    if not all(Path(folder, DESCRIPTION).is_file() for folder in (train_local, test_local)):
        return None
    label = {name: position for position, name in enumerate(class_names(train_local))}
    names = class_names(test_local)
    if unknown := [name for name in names if name not in label]:
        raise ValueError(
            f"{test_local}: the class {unknown[0]!r} is none of the {len(label)} of the training images in "
            f"{train_local}; expected test images of the same classes"
        )
    return torch.tensor([label[name] for name in names], dtype=torch.int64)


def relabelled(labels: Tensor, new: Tensor | None) -> Tensor:
    """Labels as :func:`training_labels` says.

    Args:
        labels: Shape (n,), int64.
        new: What each of them becomes, shape (classes,), int64; ``None``: they stay.

    Returns:
        Shape (n,), int64.

    Raises:
        ValueError: If a label is outside of the classes.
    """
    if new is None or not len(labels):
        return labels
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(new):
        worst = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise ValueError(f"got the test label {worst}; expected 0 to {len(new) - 1}, the classes by name")
    return new[labels]


def encode(
    encoders: Mapping[str, nn.Module],
    local: str | Path,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    batch_size: int = 128,
    workers: int = 0,
    pooling: Pooling = "average",
) -> tuple[dict[str, Tensor], Tensor]:
    """Features of every image of a folder of shards, resized and cropped in the middle.

    Args:
        encoders: As for :func:`extract_features`, like ``device`` and ``pooling``.
        local: Folder of MDS shards.
        image_size: Side of the square images that the encoders see, in pixels.
        mean: Per-channel mean of the normalised input, pixel range [0, 1].
        std: Per-channel standard deviation of the normalised input, pixel range [0, 1].
        device: See ``encoders``.
        batch_size: Images per forward.
        workers: Processes that decode; 0: this one.
        pooling: See ``encoders``.

    Returns:
        Features of each encoder, shape (n, dim), float32, and labels, shape (n,), int64, on the CPU.

    Raises:
        ValueError: If an encoder or the data do not fit.
    """
    loader = evaluation_data(local, image_size=image_size, batch_size=batch_size, workers=workers)
    return extract_features(encoders, loader, normalize=Normalize(mean, std), device=device, pooling=pooling)
