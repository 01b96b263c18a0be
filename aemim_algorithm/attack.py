"""Projected gradient ascent inside an L-infinity ball (Madry et al. 2018; paper, Eq. 3 and 6).

Pixels are those of [0, 1]; models see ``(pixels - mean) / std``. Budgets are given in 1/255 of the pixel
range and become bounds for each channel of the normalised image, so that no pass needs to convert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from aemim_algorithm.validation import require_integer, require_number, require_per_channel

__all__ = ["at_least_float32", "linf_distance", "outside_pixel_range", "pgd_attack", "unit_gradient"]


def pgd_attack(
    objective: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    epsilon: float,
    steps: int,
    step_size: float | None = None,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Maximise ``objective`` over the ball of radius ``epsilon`` around ``images``.

    Starts from uniform noise inside the ball: without it, a distance to the clean features and its
    gradient are zero. Only the image is differentiated; no parameter receives a gradient.

    Args:
        objective: Maps adversarial images, shaped as ``images``, to the scalar to maximise. Sum it
            over samples, so that each sample's gradient is its own.
        images: Clean images, normalised, shape (batch, channels, height, width) or
            (batch, frames, channels, height, width).
        epsilon: L-infinity budget, in 1/255 of the pixel range.
        steps: Number of gradient steps T; 0 leaves the starting noise alone.
        step_size: Length μ of a step, in 1/255; ``None`` is ``1.25 * epsilon / steps`` (Wong et al.
            2020, arXiv 2001.03994, for one step).
        mean: Mean of the normalisation, one value for each channel, in [0, 1] pixels.
        std: Standard deviation of the normalisation, likewise.
        generator: Source of the starting noise; the global one if ``None``.
        noise: Starting noise in [-1, 1], shaped as ``images``, in units of ``epsilon``; overrides
            ``generator``.

    Returns:
        Adversarial images, shaped as ``images``, inside the ball and the pixel range, detached.

    Raises:
        ValueError: If a number is out of range, or ``mean`` does not fit the channels.
    """
    require_number("epsilon", epsilon, low=0, high=255, unit=" (1/255 of the pixel range)")
    require_integer("steps", steps, low=0)
    if step_size is None:
        step_size = 1.25 * epsilon / max(steps, 1)
    require_number("step_size", step_size, low=0, unit=" (1/255 of the pixel range)")

    clean = at_least_float32(images.detach())
    unit = _unit(clean, std)
    lower, upper = _bounds(clean, epsilon * unit, mean, std)
    if noise is None:
        noise = torch.rand(clean.shape, generator=generator, device=clean.device) * 2 - 1

    adversarial = (clean + epsilon * unit * noise).clamp(lower, upper)
    for _ in range(steps):
        gradient = _image_gradient(objective, adversarial.to(images.dtype))
        # Half precision may overflow to inf - inf on the way back: such a pixel stays where it is.
        adversarial = (adversarial + step_size * unit * gradient.sign().nan_to_num()).clamp(lower, upper)
    return adversarial.to(images.dtype)


def unit_gradient(features: Tensor) -> Tensor:
    """The features themselves, in at least float32, whose gradient comes back with a maximum near 1.

    ``sign`` ignores the scale of a gradient, but half precision does not: the gradient of a small
    distance underflows to zero on its way to the image, and that of a large one overflows. The factor
    is a power of two for the whole batch, so it changes no bit of what does not leave the range.

    Args:
        features: What the objective of :func:`pgd_attack` compares, any shape.

    Returns:
        The same shape.
    """
    return _UnitGradient.apply(at_least_float32(features))


class _UnitGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        exponent = torch.frexp(gradient.abs().amax()).exponent.clamp(-120, 120)  # 2**128 would be infinite
        return torch.ldexp(gradient, -exponent)


def linf_distance(adversarial: Tensor, images: Tensor, std: Sequence[float]) -> Tensor:
    """Largest perturbation of each sample, in 1/255 of the pixel range; shape (batch,), float32."""
    difference = (at_least_float32(adversarial) - at_least_float32(images)) / _unit(images, std)
    return difference.abs().flatten(1).amax(dim=1)


def outside_pixel_range(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """How far the images leave the range that ``mean`` and ``std`` imply.

    Returns:
        Scalar, in units of the pixel range: 0 if every pixel lies in [0, 1].
    """
    scale, center = _per_channel(std, images, "std"), _per_channel(mean, images, "mean")
    pixels = at_least_float32(images) * scale + center
    return torch.maximum(-pixels.amin(), pixels.amax() - 1).clamp_min(0)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen half precision: its rounding is coarser than the steps inside the ball."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _image_gradient(objective: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    images = images.detach().requires_grad_(True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(objective(images), images)
    return at_least_float32(gradient)


def _bounds(
    images: Tensor, radius: Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The ball cut with the pixel range; an image that is outside the range stays where it is."""
    center, scale = _per_channel(mean, images, "mean"), _per_channel(std, images, "std")
    darkest, brightest = (0 - center) / scale, (1 - center) / scale
    lower = torch.minimum(torch.maximum(images - radius, darkest), images)
    upper = torch.maximum(torch.minimum(images + radius, brightest), images)
    return lower, upper


def _unit(images: Tensor, std: Sequence[float]) -> Tensor:
    """1/255 of the pixel range, in each channel's normalised units."""
    return 1 / 255 / _per_channel(std, images, "std")


def _per_channel(values: Sequence[float], images: Tensor, name: str) -> Tensor:
    """Shape one value a channel so that it broadcasts over images or videos."""
    require_per_channel(name, values, positive=name == "std")
    dtype = torch.promote_types(images.dtype, torch.float32)
    for axis in (-3, 1):  # (…, channels, height, width), else (batch, channels, frames, …)
        if images.ndim >= 4 and images.shape[axis] == len(values):
            shape = [1] * images.ndim
            shape[axis] = -1
            return torch.tensor(values, dtype=dtype, device=images.device).view(shape)
    raise ValueError(
        f"{name}={tuple(values)} has {len(values)} values, but the images have shape "
        f"{tuple(images.shape)}: pass one value for each channel"
    )
