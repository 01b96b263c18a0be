"""Mask R-CNN on a plain ViT: torchvision's heads, sampling and losses, as a ComposerModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from composer.models import ComposerModel
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torchmetrics import Metric
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from aemim_algorithm.detection.average_precision import AveragePrecision
from aemim_algorithm.detection.backbone import ViTBackbone
from aemim_algorithm.detection.pyramid import LEVELS
from aemim_algorithm.models.classifier import layer_groups

__all__ = ["Detector", "Heads", "View", "build_detector", "detector_groups"]

_BOX_POOL, _MASK_POOL = 7, 14  # cells of a region's crop
_ASPECT_RATIOS = (0.5, 1.0, 2.0)
_ANCHOR = 8  # sides of an anchor, in cells of its map


@dataclass
class Heads:
    """Sizes of what torchvision puts on the maps, by its own names where it has one.

    ``channels`` is the width of the pyramid, ``box_width`` that of the two layers of the box head and
    ``mask_width`` that of the four of the mask head.
    """

    channels: int = 256
    box_width: int = 1024
    mask_width: int = 256
    rpn_batch_size_per_image: int = 256
    rpn_pre_nms_top_n_train: int = 2000
    rpn_post_nms_top_n_train: int = 2000
    rpn_pre_nms_top_n_test: int = 1000
    rpn_post_nms_top_n_test: int = 1000
    box_batch_size_per_image: int = 512
    box_score_thresh: float = 0.05
    box_detections_per_img: int = 100


@dataclass(frozen=True)
class View:
    """What of an image the network sees.

    Attributes:
        mean: Of the pixels in [0, 1], per channel.
        std: Of the pixels in [0, 1], per channel.
        short_sides: Of the resized image, in pixels: drawn for each in training, the last one in evaluation.
        long_side: Largest, in pixels; the short side is smaller where the long one would exceed it.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    short_sides: tuple[int, ...]
    long_side: int


class Detector(ComposerModel):
    """Mask R-CNN under its own five losses, with the AP of boxes and masks in evaluation.

    Batches are ``{"image": [...], "target": [...]}``: uint8 images of shape (3, height, width), and targets
    as torchvision's detectors take them; for evaluation also ``crowd`` and ``area``.

    Args:
        network: Of `build_detector`.
    """

    def __init__(self, network: MaskRCNN) -> None:
        super().__init__()
        self.network = network
        self.scores: dict[str, Metric] = {
            "box_AP": AveragePrecision("bbox"),
            "mask_AP": AveragePrecision("segm"),
        }

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """The losses of a batch, in training mode; scalars."""
        targets = [{key: target[key] for key in ("boxes", "labels", "masks")} for target in batch["target"]]
        losses: dict[str, Tensor] = self.network(_pixels(batch), targets)
        return losses

    def loss(  # type: ignore[override]  # Composer takes a dict too
        self, outputs: dict[str, Tensor], batch: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The losses and their sum, which is what is minimised."""
        return {"total": torch.stack([value.float() for value in outputs.values()]).sum(), **outputs}

    @torch.no_grad()
    def eval_forward(self, batch: Any, outputs: Any = None) -> list[dict[str, Tensor]]:
        """Detections in the pixels of the images: ``boxes``, ``labels``, ``scores`` and boolean ``masks``."""
        found = self.network(_pixels(batch))
        return [each | {"masks": each["masks"][:, 0] > 0.5} for each in found]

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        """``box_AP`` and ``mask_AP``, as fractions; none in training."""
        return {} if is_train else self.scores

    def update_metric(self, batch: Any, outputs: list[dict[str, Tensor]], metric: Metric) -> None:
        """Count a batch's detections against all of its objects, crowds too."""
        objects = [
            {key: target[key] for key in ("boxes", "labels", "masks", "area")}
            | {"iscrowd": target["crowd"].long()}
            for target in batch["target"]
        ]
        metric.update(outputs, objects)


def build_detector(backbone: ViTBackbone, *, num_classes: int, heads: Heads, view: View) -> MaskRCNN:
    """Put torchvision's heads on a backbone.

    Args:
        backbone: Makes the maps.
        num_classes: Number of categories, without the background.
        heads: Their sizes.
        view: What of an image they see.

    Returns:
        The network, with random heads. Its state depends on no image that it has seen.
    """
    box_pool, mask_pool = (_pool(backbone, size) for size in (_BOX_POOL, _MASK_POOL))
    named = {key: value for key, value in vars(heads).items() if key.startswith(("rpn_", "box_"))}
    del named["box_width"]
    network = MaskRCNN(
        backbone,
        min_size=[*view.short_sides],
        max_size=view.long_side,
        image_mean=[*view.mean],
        image_std=[*view.std],
        size_divisible=backbone.divisor,
        rpn_anchor_generator=_Anchors(backbone.strides),
        box_roi_pool=box_pool,
        box_head=TwoMLPHead(heads.channels * _BOX_POOL**2, heads.box_width),
        box_predictor=FastRCNNPredictor(heads.box_width, num_classes + 1),
        mask_roi_pool=mask_pool,
        mask_head=MaskRCNNHeads(heads.channels, (heads.mask_width,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(heads.mask_width, heads.mask_width, num_classes + 1),
        **named,
    )
    # Boxes are decoded in the type of these: in bfloat16 a coordinate of 1,000 pixels is off by up to 2.
    for module in (network.rpn.head, network.roi_heads.box_predictor, network.roi_heads.mask_predictor):
        module.register_forward_hook(_in_float32)
    return network


def detector_groups(
    network: MaskRCNN, *, learning_rate: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Groups of an optimizer in which the rate falls with a block's distance to the pyramid.

    Of ``n`` blocks, block ``i`` of 1 to ``n`` has learning_rate * layer_decay^(n + 1 - i), and so has the
    embedding as block 0; the final norm belongs to the last block. Pyramid and heads have all of the rate.

    Args:
        network: Of `build_detector`; parameters of a frozen encoder are in no group.
        learning_rate: Of the heads.
        weight_decay: Of matrices; vectors, tokens and position embeddings have none.
        layer_decay: Factor from a block to the one before it, in (0, 1].

    Returns:
        The groups, each with ``params``, ``lr``, ``weight_decay``.
    """
    backbone: Any = network.backbone
    groups = []
    if not backbone.frozen:
        # timm gives the last block of a network without a head all of the rate.
        rates = {"learning_rate": learning_rate * layer_decay, "layer_decay": layer_decay}
        groups = layer_groups(backbone.encoder, **rates, weight_decay=weight_decay)
    heads = nn.ModuleList([backbone.pyramid, network.rpn, network.roi_heads])
    others = param_groups_weight_decay(heads, weight_decay=weight_decay)
    return groups + [group | {"lr": learning_rate} for group in others]


class _Anchors(AnchorGenerator):
    """Anchors at the strides that the maps have, in float32.

    torchvision divides the image by the map, which gives 61 in place of 64 where 25 cells are pooled to 13,
    and takes the maps' type.
    """

    def __init__(self, strides: Sequence[int]) -> None:
        sizes = tuple((_ANCHOR * stride,) for stride in strides)
        super().__init__(sizes, (_ASPECT_RATIOS,) * len(sizes))
        self._strides = [[torch.tensor(stride)] * 2 for stride in strides]

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32, device)

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        found: list[Tensor] = super().grid_anchors(grid_sizes, self._strides)
        return found


def _pool(backbone: ViTBackbone, size: int) -> MultiScaleRoIAlign:
    """Crops of regions; told what torchvision would guess from the first batch, where padding misleads it."""
    pool = MultiScaleRoIAlign([*LEVELS], output_size=size, sampling_ratio=2)
    strides = backbone.strides[: len(LEVELS)]
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = initLevelMapper(strides[0].bit_length() - 1, strides[-1].bit_length() - 1)
    return pool


def _in_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.float()
    return type(outputs)(_in_float32(module, inputs, each) for each in outputs)


def _pixels(batch: Mapping[str, Any]) -> list[Tensor]:
    return [image.float() / 255 for image in batch["image"]]
