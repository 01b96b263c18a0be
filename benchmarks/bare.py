"""AEMIM's passes written out by hand for one model: what is left when all that makes AEMIM general is gone.

No tap on the encoder, no plan of the batch, no random numbers that survive a restart, no metrics. What a step
of AEMIM takes beyond this is its overhead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from composer.models import ComposerModel
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.optim import Optimizer

from aemim_algorithm import AEMIM
from aemim_algorithm.adapters import adapters_of, apply_adapters
from aemim_algorithm.models import MAE, SimMIM
from aemim_algorithm.models.masking import random_mask, split_indices, unpatchify, upsample_mask

__all__ = ["BarePasses"]

Pass = Callable[[Tensor], Tensor]


def every(ratio: float, size: int) -> Tensor:
    """The first of every ``1 / ratio`` samples."""
    return torch.arange(0, size, round(1 / ratio))


def uniform_noise(images: Tensor) -> Tensor:
    """Numbers in [-1, 1) from the global generator, shaped as the images."""
    return torch.rand_like(images, dtype=torch.float32) * 2 - 1


class BarePasses:
    """The passes of one AEMIM on one of our models.

    Args:
        model: A MAE or SimMIM; it gets adversarial copies of its normalization layers.
        optimizer: Trains the model, and the copies.
        algorithm: Whose steps, budget and share of the batch to take; with the L2 distance.
        choose: From share and size of a batch to the samples to attack.
        noise: Makes the starting noise of images, in [-1, 1].

    Raises:
        TypeError: If the model is another one.
    """

    def __init__(
        self,
        model: ComposerModel,
        optimizer: Optimizer,
        algorithm: AEMIM,
        *,
        choose: Callable[[float, int], Tensor] = every,
        noise: Callable[[Tensor], Tensor] = uniform_noise,
    ) -> None:
        if not isinstance(model, MAE | SimMIM):
            raise TypeError(f"{type(model).__name__}: expected a MAE or SimMIM")
        apply_adapters(model, "norm", optimizer)
        self.model = model
        self._adapters = adapters_of(model)
        self._epsilon, self._ratio, self._lambda = (
            algorithm.present(name) for name in ("epsilon", "adversarial_ratio", "loss_ratio")
        )
        self._steps = algorithm.steps
        self._choose, self._noise = choose, noise
        device = next(model.parameters()).device
        mean, std = (
            torch.tensor(values, device=device).view(3, 1, 1)
            for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        self._unit, self._darkest, self._brightest = 1 / 255 / std, -mean / std, (1 - mean) / std

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """λ·L_c + (1−λ)·L_a of a batch of images and labels."""
        images, labels = batch
        mask = random_mask(len(images), self.model.num_patches, self.model.mask_ratio, device=images.device)
        encode, decode = passes_of(self.model, mask)
        features = encode(images)
        clean = self.model.loss({"prediction": decode(features), "mask": mask}, batch)
        reference = features.detach()
        if self._ratio < 1:
            chosen = self._choose(self._ratio, len(images)).to(images.device)
            images, labels, mask, reference = images[chosen], labels[chosen], mask[chosen], reference[chosen]
        self._switch(True)
        encode, decode = passes_of(self.model, mask)
        prediction = decode(encode(self._attack(encode, images, reference)))
        adversarial = self.model.loss({"prediction": prediction, "mask": mask}, (images, labels))
        self._switch(False)
        return self._lambda * clean + (1 - self._lambda) * adversarial

    def _attack(self, encode: Pass, images: Tensor, reference: Tensor) -> Tensor:
        radius, step = self._epsilon * self._unit, 1.25 * self._epsilon / self._steps * self._unit
        lower = (images - radius).maximum(self._darkest)
        upper = (images + radius).minimum(self._brightest)
        attacked = (images + radius * self._noise(images)).clamp(lower, upper)
        for _ in range(self._steps):
            attacked.requires_grad_(True)
            distance = (encode(attacked).float() - reference.float()).square().sum()
            (gradient,) = torch.autograd.grad(distance, attacked)
            attacked = (attacked.detach() + step * gradient.sign()).clamp(lower, upper)
        return attacked

    def _switch(self, adversarial: bool) -> None:
        for adapter in self._adapters:
            adapter.adversarial_mode = adversarial


def passes_of(model: MAE | SimMIM, mask: Tensor) -> tuple[Pass, Pass]:
    """A model's encoder and decoder under a mask: images to features, and features to the prediction."""
    return _mae_passes(model, mask) if isinstance(model, MAE) else _simmim_passes(model, mask)


def _mae_passes(model: MAE, mask: Tensor) -> tuple[Pass, Pass]:
    visible, hidden = split_indices(mask, model.num_visible)

    def decode(features: Tensor) -> Tensor:
        return model.decoder(features, visible, hidden)

    return lambda images: model.encoder(images, visible), decode


def _simmim_passes(model: SimMIM, mask: Tensor) -> tuple[Pass, Pass]:
    encoder = model.encoder
    hidden = upsample_mask(mask, model.mask_grid, model.mask_patch_size // encoder.patch_size)

    def decode(features: Tensor) -> Tensor:
        patches = model.decoder(features[:, encoder.num_prefix_tokens :])
        return unpatchify(patches, encoder.patch_size, encoder.grid)

    return lambda images: encoder(images, hidden), decode
