"""Mask R-CNN on a small ViT: losses, detections, anchors, rates, precision."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from small_detectors import HEADS, VIEW, rectangles, some_batch, some_images, tiny_backbone, tiny_detector
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.image_list import ImageList

from aemim_algorithm.detection.model import Detector, View, build_detector, detector_groups

LOSSES = {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}


def test_training_gives_torchvisions_five_losses_and_their_sum() -> None:
    model = tiny_detector().train()
    outputs = model(some_batch())
    assert set(outputs) == LOSSES
    losses = model.loss(outputs, some_batch())
    assert float(losses["total"]) == pytest.approx(sum(float(value) for value in outputs.values()))
    assert all(losses["total"] is not value for value in outputs.values())
    losses["total"].backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_the_heads_see_what_torchvision_would_show_them() -> None:
    """Oracle: the same backbone under a MaskRCNN that torchvision makes by itself, with its guesses."""
    torch.manual_seed(0)
    backbone = tiny_backbone()
    ours = build_detector(backbone, num_classes=3, heads=HEADS, view=VIEW).eval()
    options = {key: value for key, value in vars(HEADS).items() if key.startswith(("rpn", "box_d", "box_s"))}
    options |= {"box_batch_size_per_image": HEADS.box_batch_size_per_image}
    roi = ours.roi_heads
    theirs = MaskRCNN(
        backbone,
        rpn_anchor_generator=ours.rpn.anchor_generator,
        box_head=roi.box_head,
        box_predictor=roi.box_predictor,
        mask_head=roi.mask_head,
        mask_predictor=roi.mask_predictor,
        min_size=64,
        max_size=96,
        image_mean=[*VIEW.mean],
        image_std=[*VIEW.std],
        size_divisible=16,
        **options,
    ).eval()
    theirs.rpn.head = ours.rpn.head
    for network in (ours, theirs):
        network.roi_heads.score_thresh = 0.0
    images = [image / 255 for image in some_images((64, 64), (64, 96))]  # no padding that could mislead it
    with torch.no_grad():
        for found, expected in zip(ours(images), theirs(images), strict=True):
            assert len(found["boxes"]) > 0
            for key, value in expected.items():
                assert torch.equal(found[key], value), key
    assert (
        theirs.roi_heads.box_roi_pool.scales
        == ours.roi_heads.box_roi_pool.scales
        == [1 / 2, 1 / 4, 1 / 8, 1 / 16]
    )
    assert vars(theirs.roi_heads.mask_roi_pool.map_levels) == vars(ours.roi_heads.mask_roi_pool.map_levels)


def test_anchors_are_centred_on_the_cells_of_padded_images() -> None:
    """80 pixels are 5 cells of 16, pooled to 3 of 32: torchvision would put those 26 pixels apart."""
    network = build_detector(tiny_backbone(), num_classes=3, heads=HEADS, view=VIEW)
    images = torch.zeros(1, 3, 80, 48)
    with torch.no_grad():
        maps = list(network.backbone(images).values())
        (anchors,) = network.rpn.anchor_generator(ImageList(images, [(80, 48)]), maps)
    start = 0
    for stride, found in zip((2, 4, 8, 16, 32), maps, strict=True):
        rows, columns = found.shape[-2:]
        level = anchors[start : start + 3 * rows * columns].reshape(rows, columns, 3, 4)
        start += 3 * rows * columns
        centres = (level[..., :2] + level[..., 2:]) / 2
        expected = torch.stack(
            torch.meshgrid(torch.arange(columns) * stride, torch.arange(rows) * stride, indexing="xy"), -1
        )
        torch.testing.assert_close(centres, expected[:, :, None].expand_as(centres).float())
        sides = level[0, 0, :, 2:] - level[0, 0, :, :2]
        assert sides[1].tolist() == [8 * stride, 8 * stride]
    assert start == len(anchors)


def test_images_are_resized_in_training_to_each_of_the_short_sides_and_in_evaluation_to_the_last() -> None:
    network = build_detector(tiny_backbone(), num_classes=3, heads=HEADS, view=VIEW).train()
    image, target = torch.rand(3, 100, 120), rectangles((100, 120), (10, 20, 60, 80))

    def seen() -> tuple[tuple[int, int], Any]:
        images, targets = network.transform([image], [target])
        return images.image_sizes[0], targets[0]

    sizes = set()
    for _ in range(20):
        size, resized = seen()
        sizes.add(size)
        expected = torch.tensor(
            [10 * size[1] / 120, 20 * size[0] / 100, 60 * size[1] / 120, 80 * size[0] / 100]
        )
        torch.testing.assert_close(resized["boxes"][0], expected)
        assert resized["masks"].shape == (1, *size)
    assert sizes == {(48, 57), (64, 76)}
    network.eval()
    assert {seen()[0] for _ in range(5)} == {(64, 76)}
    long = network.transform([torch.rand(3, 60, 180)])[0].image_sizes
    assert long == [(32, 96)]


def test_detections_are_in_the_pixels_of_the_images() -> None:
    model = tiny_detector().eval()
    model.network.roi_heads.score_thresh = 0.0
    batch = some_batch()
    found = model.eval_forward(batch)
    for each, image in zip(found, batch["image"], strict=True):
        height, width = image.shape[-2:]
        assert 0 < len(each["boxes"]) <= HEADS.box_detections_per_img
        assert each["masks"].dtype == torch.bool
        assert each["masks"].shape[1:] == (height, width)
        assert float(each["boxes"].min()) >= 0
        assert (each["boxes"].max(0).values <= torch.tensor([width, height, width, height])).all()
    for metric in model.get_metrics().values():
        model.update_metric(batch, found, metric)
        assert 0 <= float(metric.compute()) <= 1
    assert model.get_metrics(is_train=True) == {}


@pytest.mark.parametrize("window", [None, 3], ids=["everything", "padded windows"])
def test_boxes_are_decoded_in_float32_under_autocast(window: int | None) -> None:
    model = tiny_detector(window=window, global_blocks=0).train()
    given: list[Tensor] = []
    model.network.rpn.box_coder.decode_single = _recording(model.network.rpn.box_coder.decode_single, given)
    model.network.roi_heads.box_predictor.register_forward_hook(lambda *parts: given.extend(parts[2]))
    backbone: list[Tensor] = []
    model.network.backbone.encoder.blocks[0].attn.register_forward_hook(
        lambda *parts: backbone.append(parts[2])
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.loss(model(some_batch()), some_batch())
    assert {value.dtype for value in backbone} == {torch.bfloat16}
    assert {value.dtype for value in given} == {torch.float32}
    assert losses["total"].isfinite()
    losses["total"].backward()


def _recording(function: Any, given: list[Tensor]) -> Any:
    def record(codes: Tensor, boxes: Tensor) -> Any:
        given.extend([codes, boxes])
        return function(codes, boxes)

    return record


def test_a_few_steps_find_the_objects_of_a_batch() -> None:
    torch.manual_seed(0)
    model = tiny_detector(seed=1).train()
    groups = detector_groups(model.network, learning_rate=3e-3, weight_decay=0.0, layer_decay=1.0)
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        total = model.loss(model(some_batch()), some_batch())["total"]
        total.backward()
        optimizer.step()
        losses.append(float(total))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize("depth", [2, 4])
def test_rates_fall_with_the_distance_to_the_pyramid(depth: int) -> None:
    """The histogram of rates, counted in parameters, from the names alone."""
    network = tiny_detector(depth=depth).network
    groups = detector_groups(network, learning_rate=2.0, weight_decay=0.05, layer_decay=0.5)
    expected: Counter[tuple[float, float]] = Counter()
    for name, value in network.named_parameters():
        layer = depth + 1
        if name.startswith("backbone.encoder.blocks."):
            layer = int(name.split(".")[3]) + 1
        elif name.startswith("backbone.encoder."):
            layer = depth if ".norm." in name else 0
        spared = value.ndim == 1 or name.endswith(("cls_token", "pos_embed"))
        expected[2.0 * 0.5 ** (depth + 1 - layer), 0.0 if spared else 0.05] += value.numel()
    found: Counter[tuple[float, float]] = Counter()
    for group in groups:
        found[group["lr"], group["weight_decay"]] += sum(value.numel() for value in group["params"])
    assert found == expected
    assert len({rate for rate, _ in found}) == depth + 2


def test_a_frozen_encoder_is_in_no_group() -> None:
    network = tiny_detector(frozen=True).network
    groups = detector_groups(network, learning_rate=1.0, weight_decay=0.1, layer_decay=0.5)
    trained = {id(value) for group in groups for value in group["params"]}
    names = {name for name, value in network.named_parameters() if id(value) in trained}
    assert names == {name for name, _ in network.named_parameters() if "encoder" not in name}


def test_what_images_came_first_is_in_no_state() -> None:
    view = View(mean=(0.5,) * 3, std=(0.5,) * 3, short_sides=(33,), long_side=96)
    network = build_detector(tiny_backbone(), num_classes=3, heads=HEADS, view=view).eval()
    scales = [*network.roi_heads.box_roi_pool.scales]
    Detector(network).eval_forward({"image": some_images((33, 33))})  # padded to 48: a guess would be wrong
    assert network.roi_heads.box_roi_pool.scales == scales == [1 / 2, 1 / 4, 1 / 8, 1 / 16]
