"""The paper's numbers, for the tables: W. Xiang et al., "AEMIM", arXiv 2407.11537, Tables 4 to 7.

`None`: the paper has no number there. Epochs are of the pre-training.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SOURCE", "TABLE_4", "TABLE_5", "TABLE_6", "TABLE_7", "PaperRow"]

SOURCE = "arXiv 2407.11537"


class PaperRow(NamedTuple):
    """One row: who was measured, and the numbers in the order of the table's columns."""

    backbone: str
    method: str
    epochs: int
    numbers: tuple[float | None, ...]


TABLE_4 = (  # pre-training time relative to MAE 300 epochs; top-1 on ImageNet, -Real, -V2
    PaperRow("ViT-S", "MoCo-v3", 300, (None, 81.4, None, None)),
    PaperRow("ViT-S", "BEiT", 300, (3.5, 81.3, None, None)),
    PaperRow("ViT-S", "CIM-RESPIX", 300, (6.3, 81.5, None, None)),
    PaperRow("ViT-S", "MAE", 300, (1.0, 80.9, 86.9, 70.1)),
    PaperRow("ViT-S", "Fast AEMIM", 300, (1.3, 81.2, 87.0, 70.5)),
    PaperRow("ViT-S", "AEMIM", 300, (2.3, 81.4, 87.2, 70.8)),
    PaperRow("ViT-B", "MoCo-v3", 300, (None, 83.2, None, None)),
    PaperRow("ViT-B", "BEiT", 800, (9.3, 83.2, None, None)),
    PaperRow("ViT-B", "CIM-RESPIX", 300, (6.3, 83.3, None, None)),
    PaperRow("ViT-B", "CIM-RESPIX", 800, (16.8, 83.4, None, None)),
    PaperRow("ViT-B", "MAE", 300, (1.0, 82.9, 87.8, 72.1)),
    PaperRow("ViT-B", "MAE", 800, (2.7, 83.3, 87.8, 72.7)),
    PaperRow("ViT-B", "MAE", 1600, (5.3, 83.6, 88.2, 73.2)),
    PaperRow("ViT-B", "Fast AEMIM", 300, (1.3, 83.3, 87.8, 72.9)),
    PaperRow("ViT-B", "Fast AEMIM", 800, (3.5, 83.6, 88.1, 73.5)),
    PaperRow("ViT-B", "AEMIM", 300, (2.3, 83.4, 87.9, 72.9)),
    PaperRow("ViT-B", "AEMIM", 800, (6.1, 83.8, 88.5, 74.0)),
)

TABLE_5 = (  # top-1 on ImageNet-A, -R, -Sketch; mCE on -C; mean of the first three and 100 - mCE
    PaperRow("ViT-S", "MAE", 300, (24.5, 45.5, 32.0, 53.9, 37.0)),
    PaperRow("ViT-S", "Fast AEMIM", 300, (24.6, 45.9, 32.2, 53.5, 37.3)),
    PaperRow("ViT-S", "AEMIM", 300, (24.3, 46.0, 33.1, 53.9, 37.4)),
    PaperRow("ViT-B", "MAE", 300, (30.9, 48.1, 34.2, 52.4, 40.2)),
    PaperRow("ViT-B", "MAE", 800, (35.3, 48.3, 34.4, 51.9, 41.5)),
    PaperRow("ViT-B", "MAE", 1600, (35.9, 48.3, 34.5, 51.7, 41.8)),
    PaperRow("ViT-B", "Fast AEMIM", 300, (34.3, 49.7, 36.1, 50.1, 42.5)),
    PaperRow("ViT-B", "Fast AEMIM", 800, (37.6, 49.7, 36.0, 49.6, 43.4)),
    PaperRow("ViT-B", "AEMIM", 300, (34.5, 49.6, 35.6, 49.8, 42.5)),
    PaperRow("ViT-B", "AEMIM", 800, (38.0, 50.6, 36.5, 49.3, 44.0)),
)

TABLE_6 = (  # top-1 under FGSM at 0, 1, 2, 4, 8 / 255, on the 5,000 images of ARES-Bench
    PaperRow("ViT-B", "MAE", 800, (83.3, 42.6, 37.3, 33.9, 31.4)),
    PaperRow("ViT-B", "MAE", 1600, (83.6, 42.8, 38.4, 35.2, 33.0)),
    PaperRow("ViT-B", "Fast AEMIM", 800, (83.6, 44.0, 38.3, 33.3, 30.8)),
    PaperRow("ViT-B", "AEMIM", 800, (83.8, 44.3, 38.7, 35.3, 32.1)),
)

TABLE_7 = (  # AP of boxes and of masks on COCO, Mask R-CNN
    PaperRow("ViT-S", "BEiT", 300, (35.6, 32.6)),
    PaperRow("ViT-S", "MAE", 300, (38.8, 35.1)),
    PaperRow("ViT-S", "Fast AEMIM", 300, (39.2, 35.5)),
    PaperRow("ViT-S", "AEMIM", 300, (40.4, 36.5)),
    PaperRow("ViT-B", "MAE", 300, (45.8, 40.7)),
    PaperRow("ViT-B", "MAE", 800, (47.2, 42.0)),
    PaperRow("ViT-B", "MAE", 1600, (48.3, 42.5)),
    PaperRow("ViT-B", "Fast AEMIM", 800, (48.0, 42.4)),
    PaperRow("ViT-B", "AEMIM", 300, (46.4, 41.3)),
    PaperRow("ViT-B", "AEMIM", 800, (48.7, 43.0)),
)
