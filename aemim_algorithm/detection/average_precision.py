"""COCO's average precision as Composer logs it: one number, with its details beside it."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, distributed
from torchmetrics.detection import MeanAveragePrecision

__all__ = ["DETAILS", "AveragePrecision"]

# By the names of the COCO papers: what torchmetrics calls them.
DETAILS = {
    "AP": "map",
    "AP50": "map_50",
    "AP75": "map_75",
    "APs": "map_small",
    "APm": "map_medium",
    "APl": "map_large",
}


class AveragePrecision(MeanAveragePrecision):
    """AP of boxes or of masks over IoU thresholds from 0.5 to 0.95, as pycocotools computes it.

    Args:
        kind: ``"bbox"`` or ``"segm"``.

    Attributes:
        details: Of the last `compute`, by the names of `DETAILS`, as fractions; ``None`` where there are no
            objects of that size.
    """

    def __init__(self, kind: Literal["bbox", "segm"]) -> None:
        # Of masks alone, torchmetrics leaves out the images without objects, and with them what is wrongly
        # found there: boxes have to be kept, too.
        super().__init__(iou_type="bbox" if kind == "bbox" else ("bbox", "segm"), backend="pycocotools")
        self._kind = kind
        self.details: dict[str, float | None] = {}

    def compute(self) -> Tensor:  # type: ignore[override]
        """The AP, scalar; -1 where there are no objects at all."""
        kept = self.iou_type
        try:
            self.iou_type = (self._kind,)
            found: dict[str, Any] = super().compute()
        finally:
            self.iou_type = kept
        values = {name: float(found[theirs]) for name, theirs in DETAILS.items()}
        self.details = {name: None if value < 0 else value for name, value in values.items()}
        return found["map"]

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """Gather what the processes have seen.

        torchmetrics gathers image by image, which goes wrong where one process has seen more than another.
        """
        for name in self._defaults:
            own = [item.cpu() if isinstance(item, Tensor) else item for item in getattr(self, name)]
            parts: list[Any] = [None] * distributed.get_world_size(process_group)
            distributed.all_gather_object(parts, own, group=process_group)
            setattr(self, name, [item for part in parts for item in part])
