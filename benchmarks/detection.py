"""What a detector costs: images per second and peak memory of Mask R-CNN on a ViT, in training and inference.

    python benchmarks/detection.py                  # ViT-B/16 at 1024 pixels, one image, float32 and bfloat16
    python benchmarks/detection.py --device cuda    # 1, 2, 4, 8 and 16 images

The contenders, a training step, one with activation checkpointing, and inference, take turns in processes of
their own (`turns.py`). What runs out of memory is recorded as such, and the rest goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from enduring import FAILED, measure_enduring
from record import environment, write_json
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from turns import Step, spread

from aemim_algorithm.detection.design import Design
from aemim_algorithm.detection.model import Detector, Heads, View, detector_groups

CONTENDERS = ("training", "training, recomputed", "inference")
CLASSES = 80
OBJECTS = 7  # of an image: COCO's mean
_HEAD = ("precision", "images", "", "s", "images/s", "peak memory, GiB", "above the built model, GiB")


@dataclass(frozen=True)
class Settings:
    """What a worker needs to know.

    Attributes:
        model: A ViT of timm.
        size: Side of the images, in pixels.
        images: Of a step.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).
        device: ``"cpu"`` or ``"cuda"``.
        seed: Of weights, images and objects.
    """

    model: str
    size: int
    images: int
    precision: str
    device: str
    seed: int


def detection_step(contender: str, settings: Settings) -> Step:
    """A contender's step: forward, losses, backward and AdamW, or detections with their masks."""
    torch.manual_seed(settings.seed)
    model = build(settings, recompute=contender == "training, recomputed")
    batch = random_batch(settings)
    groups = detector_groups(model.network, learning_rate=1e-4, weight_decay=0.05, layer_decay=0.65)
    optimizer = torch.optim.AdamW(groups, fused=True) if contender != "inference" else None
    model.train(optimizer is not None)

    def step() -> None:
        bf16 = settings.precision == "bf16"
        with torch.autocast(settings.device, dtype=torch.bfloat16, enabled=bf16):
            if optimizer is None:
                model.eval_forward(batch)
                return
            loss = model.loss(model(batch), batch)["total"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def build(settings: Settings, *, recompute: bool) -> Detector:
    """The detector of ``yamls/detect``, with random weights."""
    design = Design(
        encoder={"name": settings.model, "kwargs": {}},
        window=14,
        global_blocks=4,
        # An untrained detector is sure of nothing: so that inference draws as many masks as it may.
        heads=Heads(box_score_thresh=0.0),
        view=View(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, (settings.size,), settings.size),
    )
    return Detector(design.build(CLASSES, drop_path=0.2, recompute=recompute)).to(settings.device)


def random_batch(settings: Settings) -> dict[str, Any]:
    """Noise, with rectangles of a tenth to a half of the side as objects."""
    size, device = settings.size, settings.device
    images, targets = [], []
    for _ in range(settings.images):
        images.append(torch.randint(0, 256, (3, size, size), dtype=torch.uint8).to(device))
        corners = (torch.rand(OBJECTS, 2) * size / 2).long()
        boxes = torch.cat([corners, corners + (size * (0.1 + 0.4 * torch.rand(OBJECTS, 2))).long()], 1)
        masks = torch.zeros(OBJECTS, size, size, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        labels = torch.randint(1, CLASSES + 1, (OBJECTS,))
        target = {"boxes": boxes.float(), "labels": labels, "masks": masks}
        targets.append({key: value.to(device) for key, value in target.items()})
    return {"image": images, "target": targets}


def sweep(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Measure all that the options ask for, and write the result as it grows."""
    for precision in options.precision:
        for images in options.images:
            print(f"{options.model} {options.size} {precision} {images}", file=sys.stderr)
            settings = Settings(options.model, options.size, images, precision, options.device, options.seed)
            makers = {name: partial(detection_step, name, settings) for name in CONTENDERS}
            measured = measure_enduring(
                makers, rounds=options.repeats, device=options.device, threads=options.threads
            )
            for name, row in measured.items():
                result["measured"].append({"precision": precision, "images": images, "contender": name} | row)
            write_json(result, options.out)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of what was measured."""
    lines = [_HEAD, ("---",) * len(_HEAD)]
    for row in rows:
        place = (row["precision"], str(row["images"]), row["contender"])
        if FAILED in row:
            lines.append((*place, row[FAILED], "–", "–", "–"))
            continue
        peak, built = row["peak_memory_bytes"], row["built_memory_bytes"]
        rate = row["images"] / statistics.median(row["seconds"])
        memory = (f"{peak / 2**30:.2f}", f"{(peak - built) / 2**30:.2f}")
        lines.append((*place, spread(row["seconds"], 3), f"{rate:.3g}", *memory))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n\nMedian (min–max)."


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; ends with code 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", default="vit_base_patch16_224", help="a ViT of timm")
    parser.add_argument("--size", type=int, default=1024, help="side of the images, in pixels")
    parser.add_argument("--images", nargs="+", type=int, help="of a step; default 1, on a GPU 1 to 16")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, help="timed steps; default 2, on a GPU 10")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default benchmarks/results/detection-DEVICE.json")
    options = parser.parse_args(arguments)
    cpu = options.device == "cpu"
    if not cpu and not on_gpu:
        parser.error("--device=cuda: expected cpu, as torch finds no GPU here")
    options.images = options.images or ([1] if cpu else [1, 2, 4, 8, 16])
    options.repeats = (2 if cpu else 10) if options.repeats is None else options.repeats
    options.out = options.out or Path(__file__).parent / "results" / f"detection-{options.device}.json"
    if options.size < 32:
        parser.error(f"--size={options.size}: expected at least 32 pixels")
    for name, value in (("images", min(options.images)), ("repeats", options.repeats)):
        if value < 1:
            parser.error(f"--{name}={value}: expected at least 1")
    return options


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    result = environment("benchmarks/detection.py", arguments)
    names = ("model", "size", "images", "precision", "repeats", "device", "threads", "seed")
    result |= {"settings": {name: getattr(options, name) for name in names}, "measured": []}
    sweep(options, result)
    print(table(result["measured"]))


if __name__ == "__main__":
    main(sys.argv[1:])
