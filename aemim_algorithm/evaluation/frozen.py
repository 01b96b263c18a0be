"""Score frozen encoders on a labelled data set: one pass over the images, two probes on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from aemim_algorithm.data.streaming import evaluation_data
from aemim_algorithm.data.transforms import Normalize
from aemim_algorithm.evaluation.features import extract_features
from aemim_algorithm.evaluation.knn import knn_accuracy
from aemim_algorithm.evaluation.linear_probe import linear_probe_accuracy

__all__ = ["evaluate_encoders"]


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
        ValueError: If an encoder or the data do not fit.
    """
    normalize = Normalize(mean, std)

    def features_of(local: str | Path) -> tuple[dict[str, Tensor], Tensor]:
        loader = evaluation_data(local, image_size=image_size, batch_size=batch_size)
        return extract_features(encoders, loader, normalize=normalize, device=device)

    (train, train_labels), (test, test_labels) = features_of(train_local), features_of(test_local)
    return {
        name: {
            "knn": knn_accuracy(train[name], train_labels, test[name], test_labels),
            "linear": linear_probe_accuracy(train[name], train_labels, test[name], test_labels),
        }
        for name in encoders
    }
