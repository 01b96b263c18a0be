from __future__ import annotations

import io
import os
import random
import signal
import struct
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN as IMAGENET_MEAN
from timm.data.constants import IMAGENET_DEFAULT_STD as IMAGENET_STD
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from aemim_algorithm.data.transforms import (
    CenterCrop,
    Normalize,
    RandomResizedCropFlip,
    decode,
    random_crop_box,
    resize_short_side,
)


def smooth_image(height: int = 60, width: int = 80, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_a_png_of_any_mode_decodes_to_the_rgb_that_pillow_sees(mode: str) -> None:
    image = smooth_image().convert(mode)
    torch.testing.assert_close(decode(encoded(image, "PNG")), as_tensor(image), rtol=0, atol=0)


@pytest.mark.parametrize(("mode", "tolerance"), [("RGB", 3), ("L", 3), ("CMYK", 8)])
def test_a_jpeg_of_any_mode_decodes_to_nearly_the_rgb_that_pillow_sees(mode: str, tolerance: int) -> None:
    data = encoded(smooth_image().convert(mode), "JPEG", quality=95)
    expected = as_tensor(Image.open(io.BytesIO(data)))
    image = decode(data)
    assert image.dtype == torch.uint8
    assert (image.int() - expected.int()).abs().max() <= tolerance


def test_a_16_bit_png_keeps_its_upper_byte() -> None:
    pixels = np.random.default_rng(0).integers(0, 2**16, (20, 30), dtype=np.uint16)
    image = decode(encoded(Image.fromarray(pixels), "PNG"))
    assert image.dtype == torch.uint8
    expected = torch.from_numpy((pixels >> 8).astype(np.uint8)).expand(3, -1, -1)
    torch.testing.assert_close(image, expected, rtol=0, atol=0)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_every_truncation_that_loses_pixels_is_an_error(format: str) -> None:
    data = encoded(smooth_image(), format)
    trailer = 12 if format == "PNG" else 0  # the last chunk of a PNG holds no pixels
    for length in range(0, len(data) - trailer, 37):
        with pytest.raises(ValueError, match=r"^image: ") as caught:
            decode(data[:length])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff", b"GIF89a"])
def test_what_is_no_image_is_one_line(data: bytes) -> None:
    with pytest.raises(ValueError, match=rf"^image: .*{len(data)} bytes[^\n]*$"):
        decode(data)


def test_an_animation_is_refused() -> None:
    frames = [smooth_image(seed=1), smooth_image(seed=2)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="animation of 2 frames"):
        decode(data)


def in_child(action: Callable[[], None]) -> None:
    """Run something that may crash its process; an exception or a crash fails the test."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def descriptor(gif: bytes) -> int:
    """Where the first frame's place and size stand in a GIF."""
    place = 13 + 3 * 2 ** ((gif[10] & 7) + 1)
    while gif[place] != 0x2C:  # skip extensions
        place += 2
        while gif[place]:
            place += 1 + gif[place]
        place += 1
    return place + 1


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_no_bytes_crash_the_decoder(format: str) -> None:
    image = smooth_image(48, 40).convert("P" if format == "GIF" else "RGB")
    whole, draw = encoded(image, format), np.random.default_rng(0)
    heads = range(descriptor(whole), descriptor(whole) + 12) if format == "GIF" else range(12, 60)

    def fuzz() -> None:
        decoded, lines = 0, set[str]()
        for _ in range(800):
            data = bytearray(whole)
            for _ in range(int(draw.integers(1, 4))):
                place = draw.choice(heads) if draw.random() < 0.5 else draw.integers(len(whole))
                data[place] = draw.integers(256)
            try:
                decoded += decode(bytes(data)).shape[0] == 3
            except ValueError as error:
                lines.add(str(error))
        assert decoded > 50
        assert lines
        assert not any("\n" in line for line in lines)

    in_child(fuzz)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_gif_whose_frame_leaves_its_screen_does_not_crash() -> None:
    data = bytearray(encoded(smooth_image(48, 40).convert("P"), "GIF"))
    place = descriptor(bytes(data))
    data[place : place + 4] = struct.pack("<HH", 40, 0)

    def decode_often() -> None:
        for _ in range(50):
            assert decode(bytes(data)).shape[0] == 3

    in_child(decode_often)


@pytest.mark.parametrize("where", ["screen", "frame"])
def test_a_gif_of_billions_of_pixels_is_refused_without_decoding_it(where: str) -> None:
    data = bytearray(encoded(smooth_image(48, 40).convert("P"), "GIF"))
    place = 6 if where == "screen" else descriptor(bytes(data)) + 4
    data[place : place + 4] = struct.pack("<HH", 65000, 65000)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"^image: [^\n]*pixels"):
        decode(bytes(data))
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("mode", ["P", "L", "1"])
def test_a_still_gif_decodes_to_the_rgb_that_pillow_sees(mode: str) -> None:
    data = encoded(smooth_image().convert(mode), "GIF")
    torch.testing.assert_close(decode(data), as_tensor(Image.open(io.BytesIO(data))), rtol=0, atol=0)


def test_random_crops_are_a_function_of_the_seed_and_touch_no_global_generator() -> None:
    image, transform = as_tensor(smooth_image()), RandomResizedCropFlip(16)
    before = torch.get_rng_state()
    first = [transform(image, seed) for seed in range(20)]
    torch.rand(3)
    after_use = torch.get_rng_state()
    again = [transform(image, seed) for seed in range(20)]
    assert torch.equal(torch.get_rng_state(), after_use)
    assert not torch.equal(before, after_use)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({crop.numpy().tobytes() for crop in first}) == 20
    assert {(crop.shape, crop.dtype) for crop in first} == {((3, 16, 16), torch.uint8)}


@pytest.mark.parametrize(("height", "width"), [(60, 80), (500, 375), (20, 400), (400, 20)])
def test_crop_boxes_are_distributed_as_those_of_torchvision(height: int, width: int) -> None:
    image, scale, ratio, count = torch.zeros(3, height, width), (0.2, 1.0), (3 / 4, 4 / 3), 3000
    ours = [random_crop_box(height, width, scale, ratio, random.Random(seed)) for seed in range(count)]
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)]
    for top, left, rows, columns in ours:
        assert 0 <= top <= height - rows < height
        assert 0 <= left <= width - columns < width
    a, b = np.array(ours, dtype=float), np.array(theirs, dtype=float)
    for x, y in zip(a.T, b.T, strict=True):  # Kolmogorov-Smirnov, p = 0.001
        grid = np.union1d(x, y)
        gap = np.searchsorted(np.sort(x), grid, "right") - np.searchsorted(np.sort(y), grid, "right")
        assert np.abs(gap).max() / count < 1.95 * (2 / count) ** 0.5


def test_random_crops_mirror_half_of_the_time_and_keep_to_their_bounds() -> None:
    # The red channel counts columns, the green one rows: a crop tells where it comes from.
    columns, rows = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="xy")
    image = torch.stack([columns, rows, rows]).to(torch.uint8)
    transform = RandomResizedCropFlip(32, scale=(0.2, 0.5))
    widths, heights = [], []
    for seed in range(300):
        crop = transform(image, seed).float()
        widths.append(float(crop[0, :, -1].mean() - crop[0, :, 0].mean()) * 32 / 31)
        heights.append(float(crop[1, -1].mean() - crop[1, 0].mean()) * 32 / 31)
    areas = np.abs(np.array(widths)) * np.array(heights) / 200**2
    assert 0.4 < np.mean(np.array(widths) < 0) < 0.6
    assert min(heights) > 0
    assert areas.min() > 0.18
    assert areas.max() < 0.52


def test_center_crop_leaves_an_image_of_its_size_alone_and_centres_others() -> None:
    image = as_tensor(smooth_image(64, 96))
    assert CenterCrop(32)(image[:, :32, :32]).equal(image[:, :32, :32])
    crop = CenterCrop(56)(image)  # the short side is 56 / 0.875 = 64 already: no resize
    assert crop.equal(image[:, 4:60, 20:76])
    mirrored = CenterCrop(24)(image.flip(-1))
    assert (mirrored.int() - CenterCrop(24)(image).flip(-1).int()).abs().max() <= 1
    assert CenterCrop(16, crop_ratio=1.0)(image).shape == (3, 16, 16)


def test_resizing_the_short_side_keeps_the_aspect_and_agrees_with_pillow() -> None:
    picture = smooth_image(60, 90)
    resized = resize_short_side(as_tensor(picture), 20)
    expected = as_tensor(picture.resize((30, 20), Image.Resampling.BICUBIC))
    assert resized.shape == (3, 20, 30)
    assert (resized.int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("structure", ["dict", "tuple", "list"])
def test_normalize_keeps_the_structure_and_agrees_with_float64(structure: str) -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    labels, kept = torch.tensor([3]), images.clone()
    batch: Any = {"image": images, "label": labels}
    if structure != "dict":
        batch = (images, labels) if structure == "tuple" else [images, labels]
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
    result = normalize(batch)
    assert type(result) is type(batch)
    got, got_labels = result.values() if structure == "dict" else result
    mean, std = (np.array(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (images.numpy().astype(np.float64) / 255 - mean) / std
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)
    assert got_labels is labels
    assert images.equal(kept)  # Composer uses the batch again
    again = normalize(result)
    assert (again["image"] if structure == "dict" else again[0]) is got


@pytest.mark.parametrize("batch", [torch.zeros(2), {"pixels": torch.zeros(2)}, (), 3])
def test_normalize_refuses_a_batch_of_unknown_structure(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"expected \{'image'"):
        Normalize(IMAGENET_MEAN, IMAGENET_STD)(batch)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: RandomResizedCropFlip(0), "image_size"),
        (lambda: RandomResizedCropFlip(8, scale=(0.5, 0.2)), "scale"),
        (lambda: RandomResizedCropFlip(8, scale=(0.5, 1.1)), "scale"),
        (lambda: RandomResizedCropFlip(8, ratio=(0.0, 1.0)), "ratio"),
        (lambda: CenterCrop(0), "image_size"),
        (lambda: CenterCrop(8, crop_ratio=0), "crop_ratio"),
        (lambda: Normalize((0.5,), (0.5,)), "mean"),
        (lambda: Normalize(IMAGENET_MEAN, (0.5, 0.0, 0.5)), "std"),
    ],
)
def test_arguments_out_of_range_are_named(build: Any, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        build()


@pytest.mark.parametrize(
    "transform",
    [
        RandomResizedCropFlip(8, scale=(0.3, 0.9)),
        CenterCrop(8, crop_ratio=0.5),
        Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ],
)
def test_the_repr_rebuilds_a_transform(transform: object) -> None:
    rebuilt = eval(repr(transform))
    assert type(rebuilt) is type(transform)
    assert repr(rebuilt) == repr(transform)
