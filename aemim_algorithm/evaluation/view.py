"""How a classifier is to see an image: resized and cropped by Pillow, as timm or as Hugging Face does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from PIL import Image
from timm.data import create_transform
from timm.data.transforms import MaybePILToTensor, str_to_interp_mode
from torch import Tensor
from torchvision.transforms import Compose, Resize

from aemim_algorithm.validation import require_choice, require_integer, require_number

__all__ = ["CROP_MODES", "INTERPOLATIONS", "EvaluationView"]

CROP_MODES = ("border", "center", "center-floor", "squash", "squash-floor")
INTERPOLATIONS = ("bicubic", "bilinear", "box", "hamming", "lanczos", "nearest")


class EvaluationView:
    """Resize and crop as timm does for evaluation, through Pillow, to uint8.

    Args:
        image_size: Side of the result, in pixels.
        crop_fraction: Share of the resized image that the crop keeps (timm's `crop_pct`): the image is
            resized to floor(image_size / crop_fraction) pixels and cropped in the middle. Above 1 it is
            smaller than the result, and the rest is black, as in timm.
        interpolation: Pillow's filter, by timm's name.
        crop_mode: What is resized to that length: the short side ("center"), both sides whatever the
            proportions ("squash"), or the long side, with padding ("border"). With "-floor" the middle is
            rounded down where it is half a pixel, as Hugging Face does; timm rounds to the even number.
        already_sized: An image of exactly `image_size` x `image_size` is left as it is, instead of being
            resized and cropped a second time (ImageNet-C, CIFAR-10).
        mean: Only for the colour of the padding of "border".

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        image_size: int,
        *,
        crop_fraction: float = 1.0,
        interpolation: str = "bicubic",
        crop_mode: str = "center",
        already_sized: bool = False,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        require_integer("image_size", image_size, low=1)
        require_number("crop_fraction", crop_fraction, low=0, high=image_size, low_open=True)
        require_choice("interpolation", interpolation, INTERPOLATIONS)
        require_choice("crop_mode", crop_mode, CROP_MODES)
        self.image_size, self.already_sized = image_size, already_sized
        if crop_mode.endswith("-floor"):
            edge = math.floor(image_size / crop_fraction)
            self._transform: Callable[[Image.Image], Tensor] = Compose(
                [
                    Resize(
                        edge if crop_mode == "center-floor" else (edge, edge),
                        interpolation=str_to_interp_mode(interpolation),
                    ),
                    partial(_crop_floor, side=image_size),
                    MaybePILToTensor(),
                ]
            )
            return
        self._transform = create_transform(
            (3, image_size, image_size),
            is_training=False,
            crop_pct=crop_fraction,
            interpolation=interpolation,
            crop_mode=crop_mode,
            mean=tuple(mean),
            normalize=False,
        )

    def __call__(self, image: Tensor) -> Tensor:
        """Shape (3, height, width), uint8 -> shape (3, image_size, image_size), uint8."""
        if self.already_sized and tuple(image.shape[-2:]) == (self.image_size, self.image_size):
            return image
        return self._transform(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))


def _crop_floor(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
