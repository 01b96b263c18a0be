"""Images with boxes, labels and masks of their objects, from the shards that `aemim data coco` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from aemim_algorithm.data.coco import COLUMNS, SUMMARY
from aemim_algorithm.data.coco_masks import masks_of
from aemim_algorithm.data.damage import read_sample
from aemim_algorithm.data.index import open_samples
from aemim_algorithm.data.shards import DESCRIPTION

__all__ = ["DetectionImages", "coco_of"]

_REMEDY = "write the shards with `aemim data coco`"


class DetectionImages(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Images with their targets.

    An item is an image, uint8, shape (3, height, width), and a target::

        {"boxes": float32, shape (n, 4), left, top, right, bottom in pixels,
         "labels": int64, shape (n,), from 1 on in the order of the categories' ids,
         "masks": uint8, shape (n, height, width), 0 or 1,
         "crowd": bool, shape (n,),
         "area": float32, shape (n,), of the annotations, in square pixels,
         "image_id": the image's id, an int}

    For training, images without objects are left out, and those that hold nothing but crowds, as Detectron2
    does; so are crowds of other images, and boxes end where their image does.

    Args:
        local: Folder of the shards.
        train: Whether the images are to be learned from. False: everything, as it is in the annotation file.

    Attributes:
        categories: Id and name of each category; label 1 is the first.
        sizes: Height and width of each image in pixels, known without reading it.
        dropped: Images without objects that the conversion left out.
        broken: Broken images and annotations that it left out.

    Raises:
        ValueError: `local` holds no complete shards of `aemim data coco`, or none with an object to train on.
        BrokenSampleError: At an item: it is not an image.
        ShardError: At an item: its shard cannot be read.
    """

    def __init__(self, local: str | Path, *, train: bool = False) -> None:
        local = Path(local)
        self._train = train
        self._samples = open_samples(local, check=_check_columns)
        description = _description(local)
        self.categories = [(category["id"], category["name"]) for category in description["categories"]]
        self.dropped, self.broken = int(description["dropped"]), len(description["broken"])
        self._labels = {identity: label for label, (identity, _) in enumerate(self.categories, start=1)}
        summary = _summary(local, len(self._samples))
        self._indices = np.flatnonzero(summary[:, 2]) if train else np.arange(len(summary))
        if not len(self._indices):
            raise ValueError(f"{local} has no image with an object: there is nothing to train on")
        self.sizes = [(int(height), int(width)) for height, width, _ in summary[self._indices]]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """Decode an image and the masks of its objects."""
        sample: dict[str, Any] = {}

        def read(sample_id: int) -> dict[str, Any]:
            sample.update(self._samples.get_item(sample_id))
            return {**sample, "label": sample["image_id"]}

        image, image_id = read_sample(self._samples, int(self._indices[index]), read)
        annotations = json.loads(sample["annotations"])
        if self._train:
            annotations = [annotation for annotation in annotations if not annotation.get("iscrowd", 0)]
        return image, {**self._target(annotations, *image.shape[1:]), "image_id": image_id}

    def _target(self, annotations: list[dict[str, Any]], height: int, width: int) -> dict[str, Tensor]:
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        if self._train:
            boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
        return {
            "boxes": boxes.float(),
            "labels": torch.tensor([self._labels[a["category_id"]] for a in annotations], dtype=torch.int64),
            "masks": masks_of([a["segmentation"] for a in annotations], height, width),
            "crowd": torch.tensor([bool(a.get("iscrowd", 0)) for a in annotations], dtype=torch.bool),
            "area": torch.tensor([a["area"] for a in annotations], dtype=torch.float32),
        }


def coco_of(local: str | Path) -> dict[str, Any]:
    """The annotation file that shards were made of, from the shards alone; their images are not decoded.

    Args:
        local: Folder of the shards.

    Returns:
        The lists "images", "annotations" and "categories", of what was converted; annotations image by image,
        categories in the order of their ids.

    Raises:
        ValueError: `local` holds no complete shards of `aemim data coco`.
    """
    local = Path(local)
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    samples = open_samples(local, check=_check_columns)
    for index in range(len(samples)):
        sample = samples.get_item(index)
        images.append(
            {
                "id": int(sample["image_id"]),
                "file_name": sample["file_name"],
                "height": int(sample["height"]),
                "width": int(sample["width"]),
                **json.loads(sample["more"]),
            }
        )
        annotations += json.loads(sample["annotations"])
    return {"images": images, "annotations": annotations, "categories": _description(local)["categories"]}


def _check_columns(folder: str, columns: dict[str, str]) -> None:
    if columns != COLUMNS:
        raise ValueError(f"{folder} has the columns {columns}, expected {COLUMNS}: {_REMEDY}")


def _description(local: Path) -> dict[str, Any]:
    try:
        description = json.loads((local / DESCRIPTION).read_text(encoding="utf-8"))
        found = {key: description[key] for key in ("categories", "dropped", "broken")}
        found["categories"] = [{**category, "id": int(category["id"])} for category in found["categories"]]
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{local} has no readable {DESCRIPTION}: {_REMEDY}") from error


def _summary(local: Path, samples: int) -> NDArray[np.int32]:
    """Height, width and number of objects of each sample, shape (samples, 3)."""
    try:
        summary: NDArray[np.int32] = np.load(local / SUMMARY, allow_pickle=False)
        if summary.shape == (samples, 3):
            return summary
    except (OSError, ValueError, EOFError):
        pass
    raise ValueError(f"{local} has no readable {SUMMARY} of its {samples} samples: {_REMEDY}")
