"""Score a frozen encoder on a labelled data set: one pass over the images, two probes on top."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from aemim_algorithm.data.streaming import evaluation_data
from aemim_algorithm.data.transforms import Normalize
from aemim_algorithm.evaluation.features import extract_features
from aemim_algorithm.evaluation.knn import knn_accuracy
from aemim_algorithm.evaluation.linear_probe import linear_probe_accuracy

__all__ = ["evaluate_encoder"]


def evaluate_encoder(
    encoder: nn.Module,
    train_local: str | Path,
    test_local: str | Path,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> dict[str, float]:
    """Top-1 of k-NN and of a linear probe on the average patch tokens.

    Args:
        encoder: As in :func:`extract_features`, on ``device``.
        train_local: Folder of MDS shards that the probes learn from.
        test_local: Folder of MDS shards that they are scored on.
        image_size: Side of the square images that the encoder sees, in pixels.
        mean: Per-channel mean of the normalised input, pixel range [0, 1].
        std: Per-channel standard deviation of the normalised input, pixel range [0, 1].
        device: Where the encoder runs.
        batch_size: Images per forward.

    Returns:
        ``{"knn": percent, "linear": percent}``.

    Raises:
        ValueError: If the encoder or the data do not fit.
    """
    normalize = Normalize(mean, std)

    def features_of(local: str | Path) -> tuple[Tensor, Tensor]:
        loader = evaluation_data(local, image_size=image_size, batch_size=batch_size)
        return extract_features(encoder, loader, normalize=normalize, device=device)

    train, test = features_of(train_local), features_of(test_local)
    return {
        "knn": knn_accuracy(*train, *test),
        "linear": linear_probe_accuracy(*train, *test),
    }
