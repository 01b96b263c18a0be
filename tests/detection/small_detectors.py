"""Detectors and backbones of two small blocks, and the batches that they are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aemim_algorithm.detection.backbone import ViTBackbone, build_encoder
from aemim_algorithm.detection.model import Detector, Heads, View, build_detector
from aemim_algorithm.models.classifier import Architecture

HEADS = Heads(
    channels=16,
    box_width=32,
    mask_width=16,
    rpn_batch_size_per_image=32,
    rpn_pre_nms_top_n_train=50,
    rpn_post_nms_top_n_train=50,
    rpn_pre_nms_top_n_test=50,
    rpn_post_nms_top_n_test=20,
    box_batch_size_per_image=16,
    box_detections_per_img=10,
)
VIEW = View(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), short_sides=(48, 64), long_side=96)


def architecture(size: int = 32, patch_size: int = 8, depth: int = 2) -> Architecture:
    sizes = {"img_size": [size, size], "patch_size": patch_size, "embed_dim": 32, "depth": depth}
    return {"name": "vit_base_patch16_224", "kwargs": sizes | {"num_heads": 2}}


def tiny_backbone(*, seed: int = 0, drop_path: float = 0.0, depth: int = 2, **options: Any) -> ViTBackbone:
    """Of patches of 8 pixels, with positions for images of 32."""
    torch.manual_seed(seed)
    encoder = build_encoder(architecture(depth=depth), drop_path=drop_path)
    with torch.no_grad():  # timm's are as good as zero
        encoder.cls_token.normal_()
        encoder.pos_embed.normal_(std=0.5)
    return ViTBackbone(encoder, **{"channels": HEADS.channels, "window": None} | options).eval()


def tiny_detector(*, num_classes: int = 3, seed: int = 0, **options: Any) -> Detector:
    backbone = tiny_backbone(seed=seed, **options)
    return Detector(build_detector(backbone, num_classes=num_classes, heads=HEADS, view=VIEW))


def some_images(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def rectangles(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> dict[str, Any]:
    """A target of rectangles, of the labels 1, 2, 3, 1, ...; their masks are exact."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "boxes": corners,
        "labels": torch.arange(len(boxes)) % 3 + 1,
        "masks": masks,
        "crowd": torch.zeros(len(boxes), dtype=torch.bool),
        "area": masks.flatten(1).sum(1).float(),
        "image_id": 7,
    }


def some_batch(seed: int = 0) -> dict[str, Any]:
    """Two images of different sizes with three objects."""
    sizes = ((50, 61), (64, 40))
    targets = [rectangles(sizes[0], (3, 4, 30, 34), (35, 10, 60, 45)), rectangles(sizes[1], (5, 20, 35, 60))]
    return {"image": some_images(*sizes, seed=seed), "target": targets}


class Pretender(Detector):
    """Says of each image what is in it, a few pixels off, and once something where there is nothing."""

    def eval_forward(self, batch: Any, outputs: Any = None) -> list[dict[str, Tensor]]:
        return [self._claim(image, target) for image, target in zip(*batch.values(), strict=True)]

    def _claim(self, image: Tensor, target: dict[str, Any]) -> dict[str, Tensor]:
        step, count = target["image_id"] % 4, len(target["labels"])
        if not count:
            mask = torch.ones(1, *image.shape[1:], dtype=torch.bool)
            return {
                "boxes": torch.tensor([[0.0, 0.0, image.shape[2], image.shape[1]]]),
                "labels": torch.tensor([1]),
                "scores": torch.tensor([0.9]),
                "masks": mask,
            }
        return {
            "boxes": target["boxes"] + torch.tensor([step, 0.0, step, 0.0]),
            "labels": target["labels"],
            "scores": 1 - torch.arange(count) / 10 - target["image_id"] / 1000,
            "masks": target["masks"].bool().roll(step, -1),
        }


def pretender() -> Detector:
    backbone = tiny_backbone()
    return Pretender(build_detector(backbone, num_classes=3, heads=HEADS, view=VIEW))
