"""Decoding, cropping and normalising images: uint8 until they are on the device.

Crops and resizes work on uint8, which costs about half of a float or PIL pipeline and moves a
quarter of the bytes to the device; `Normalize` then runs there, once per micro-batch. Random
crops are a function of a seed alone, so whoever derives the seed decides what a crop depends on.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import DecompressionBombError, DecompressionBombWarning
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from aemim_algorithm.validation import require_integer, require_number, require_per_channel

__all__ = [
    "MAX_PIXELS",
    "MIN_SIDE",
    "CenterCrop",
    "Normalize",
    "RandomResizedCropFlip",
    "decode",
    "random_crop_box",
    "resize_short_side",
]

MAX_PIXELS = 100_000_000  # 300 MB decoded, in each process that decodes
MIN_SIDE = 8  # pixels: the smallest images that are used as data sets; less is a placeholder, not a picture

# Of each format its first bytes, and who reads its header.
_HEADERS: dict[bytes, type[ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG": PngImageFile,
    b"RIFF": WebPImageFile,
    b"GIF8": GifImageFile,
}

# What Pillow raises for damaged bytes; the warning where warnings are errors.
_PILLOW_ERRORS = (
    DecompressionBombError,
    DecompressionBombWarning,
    EOFError,
    IndexError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)


def decode(data: bytes) -> Tensor:
    """Decode a JPEG, PNG, WebP or still GIF, whatever its file was called, to three channels.

    Grey becomes RGB by repetition, CMYK is converted, transparency is dropped, 16-bit PNGs keep
    their upper byte. An EXIF orientation is ignored, as in the original MAE's pipeline.

    Args:
        data: The bytes of the image file.

    Returns:
        The image, shape (3, height, width), uint8.

    Raises:
        ValueError: The bytes are no such image, are truncated, or hold an animation; or the image has more
            than `MAX_PIXELS` or a side of less than `MIN_SIDE`, as its header tells before it is decoded.
    """
    if not data:
        raise ValueError("image: got 0 bytes, expected a JPEG, PNG, WebP or GIF file")
    header = _checked_header(data)
    if isinstance(header, GifImageFile):
        return _decode_gif(header, data)
    try:
        # A bytearray, because frombuffer warns about read-only memory.
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        image = decode_image(buffer, mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise _undecodable(data, error) from error
    if image.dtype == torch.uint16:  # 16-bit PNG; torch has no uint16 shift on the CPU
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return image


def _decode_gif(image: GifImageFile, data: bytes) -> Tensor:
    """With Pillow: torchvision writes beyond its memory where a frame is not inside the screen."""
    try:
        pixels = np.array(image.convert("RGB"))
    except _PILLOW_ERRORS as error:
        raise _undecodable(data, error) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _checked_header(data: bytes) -> ImageFile:
    """Raise `ValueError` for what is not to be decoded: a file of 1 kB can fill gigabytes."""
    read = next((reader for start, reader in _HEADERS.items() if data.startswith(start)), None)
    if read is None:
        raise ValueError(f"image: {len(data)} bytes are no JPEG, PNG, WebP or GIF file")
    try:
        header = read(BytesIO(data))
    except _PILLOW_ERRORS as error:
        raise _undecodable(data, error) from error
    _check_size(*header.size)
    try:
        frames = header.n_frames if isinstance(header, GifImageFile | WebPImageFile) else 1
    except _PILLOW_ERRORS as error:
        raise _undecodable(data, error) from error
    if frames > 1:
        raise ValueError(f"image: got an animation of {frames} frames, expected one still")
    return header


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"image: {width}×{height} pixels, expected at most {MAX_PIXELS:,}: resize it")
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"image: {width}×{height} pixels, expected sides of at least {MIN_SIDE}")


def _undecodable(data: bytes, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return ValueError(f"image: {len(data)} bytes cannot be decoded ({reason})")


def resize_short_side(image: Tensor, size: int) -> Tensor:
    """Resize so that the short side has `size` pixels, bicubic with antialiasing.

    Args:
        image: Shape (3, height, width), uint8.
        size: Pixels of the result's short side.

    Returns:
        Shape (3, size, width') or (3, height', size), uint8.
    """
    return F.resize(image, [size], interpolation=InterpolationMode.BICUBIC, antialias=True)


class RandomResizedCropFlip:
    """A random crop, resized to a square, and mirrored half of the time; stateless.

    Args:
        image_size: Side of the result, in pixels.
        scale: Bounds of the crop's area, as a fraction of the image's.
        ratio: Bounds of the crop's width over its height.

    Raises:
        ValueError: `image_size` is below 1, or the bounds are not 0 < low <= high (scale: <= 1).
    """

    def __init__(
        self,
        image_size: int,
        *,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        require_integer("image_size", image_size, low=1)
        for name, bounds, high in (("scale", scale, 1.0), ("ratio", ratio, math.inf)):
            if not 0 < bounds[0] <= bounds[1] <= high:
                raise ValueError(f"{name}={bounds!r}: expected 0 < low <= high <= {high:g}")
        self.image_size, self.scale, self.ratio = image_size, (*scale,), (*ratio,)

    def __call__(self, image: Tensor, generator_seed: int) -> Tensor:
        """Crop, resize and perhaps mirror one image.

        Args:
            image: Shape (3, height, width), uint8.
            generator_seed: Alone decides crop and mirroring.

        Returns:
            Shape (3, image_size, image_size), uint8, contiguous.
        """
        draw = random.Random(generator_seed)
        box = random_crop_box(image.shape[-2], image.shape[-1], self.scale, self.ratio, draw)
        mirror = draw.random() < 0.5
        size = [self.image_size, self.image_size]
        crop = F.resized_crop(image, *box, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        return (crop.flip(-1) if mirror else crop).contiguous()

    def __repr__(self) -> str:
        return f"RandomResizedCropFlip({self.image_size}, scale={self.scale!r}, ratio={self.ratio!r})"


def random_crop_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draw: random.Random,
) -> tuple[int, int, int, int]:
    """Draw the crop of Inception training, as torchvision's ``RandomResizedCrop`` does.

    In plain Python, because torchvision's draws ten tensors of one number, and that costs as much as
    decoding a small image; and from a generator of its own, so that no global one is touched.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        scale: Bounds of the crop's area, as a fraction of the image's.
        ratio: Bounds of the crop's width over its height; drawn evenly on a log scale.
        draw: Source of randomness.

    Returns:
        Top, left, height and width of the crop, in pixels.
    """
    for _ in range(10):
        area = height * width * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(math.log(ratio[0]), math.log(ratio[1])))
        rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < rows <= height and 0 < columns <= width:
            return draw.randint(0, height - rows), draw.randint(0, width - columns), rows, columns
    # Hardly any crop fits: the largest one in the middle whose ratio is allowed.
    aspect = min(max(width / height, ratio[0]), ratio[1])
    rows, columns = min(height, round(width / aspect)), min(width, round(height * aspect))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


class CenterCrop:
    """The evaluation view: the middle square of the image at a fixed scale; deterministic.

    Args:
        image_size: Side of the result, in pixels. An image of just that size is left as it is.
        crop_ratio: Side of the crop over the short side of the image it is cut from.

    Raises:
        ValueError: `image_size` is below 1 or `crop_ratio` outside (0, 1].
    """

    def __init__(self, image_size: int, *, crop_ratio: float = 224 / 256) -> None:
        require_integer("image_size", image_size, low=1)
        require_number("crop_ratio", crop_ratio, low=0, high=1, low_open=True)
        self.image_size, self.crop_ratio = image_size, crop_ratio

    def __call__(self, image: Tensor) -> Tensor:
        """Shape (3, height, width), uint8 -> shape (3, image_size, image_size), uint8."""
        size = [self.image_size, self.image_size]
        if list(image.shape[-2:]) == size:
            return image
        image = resize_short_side(image, round(self.image_size / self.crop_ratio))
        return F.center_crop(image, size).contiguous()

    def __repr__(self) -> str:
        return f"CenterCrop({self.image_size}, crop_ratio={self.crop_ratio!r})"


class Normalize:
    """`(x / 255 - mean) / std` for a whole batch, on whatever device the batch is.

    Made for Composer's `DataSpec(microbatch_transforms=...)`. Images that are floating point
    already are left alone, so that applying it twice is harmless.

    Args:
        mean: Mean per channel, of pixels in [0, 1].
        std: Standard deviation per channel, of pixels in [0, 1].

    Raises:
        ValueError: `mean` or `std` has not three numbers, or one of `std` is not positive.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        require_per_channel("mean", mean)
        require_per_channel("std", std, positive=True)
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"mean={mean!r}, std={std!r}: expected three numbers each")
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        # A fresh tensor per micro-batch would wait for the GPU each time.
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, batch: Any) -> Any:
        """Normalise a batch's images; everything else in it stays.

        Args:
            batch: `{"image": images, ...}`, or a tuple or list `(images, ...)`; images of shape
                (batch, 3, height, width), uint8.

        Returns:
            The same structure with float32 images; the batch passed in is not changed.

        Raises:
            ValueError: The batch has another structure.
        """
        if isinstance(batch, dict) and "image" in batch:
            return {**batch, "image": self._normalize(batch["image"])}
        if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
            return type(batch)([self._normalize(batch[0]), *batch[1:]])
        got = f"keys {sorted(batch)}" if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(f"batch: got {got}, expected {{'image': ...}} or (images, ...)")

    def _normalize(self, images: Tensor) -> Tensor:
        if images.is_floating_point():
            return images
        if images.device not in self._on_device:
            mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (self.mean, self.std))
            self._on_device[images.device] = mean, std
        mean, std = self._on_device[images.device]
        return images.to(torch.float32).div_(255).sub_(mean).div_(std)

    def __repr__(self) -> str:
        return f"Normalize({self.mean!r}, {self.std!r})"
