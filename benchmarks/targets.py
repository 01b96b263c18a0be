"""What an attack has to work with: a batch after its clean pass, and passes of the encoder that end early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aemim_algorithm.models import MAE
from aemim_algorithm.models.masking import visible_indices
from aemim_algorithm.models.vit import MaskedViT

__all__ = ["Target", "clean_pass", "recorded", "truncated"]


@dataclass(frozen=True)
class Target:
    """A batch after the clean training forward, and what that leaves for nothing.

    Attributes:
        model: The model, with adapters.
        images: Clean images, normalised.
        mask: True where a patch is hidden, shape (batch, patches).
        visible: The visible patches, shape (batch, count).
        noise: Starting noise, in [-1, 1].
        epsilon: L-infinity budget, in 1/255 of the pixel range.
        layers: What each number of blocks, from none on, has made of the clean images; detached.
        leaf: The images that the clean graph starts from.
        output: The clean features with their graph.
        loss_gradient: Of the clean loss with respect to the images: the clean backward, if it is run before
            the attack, gives it for one more product with the weight of the patch embedding.
    """

    model: MAE
    images: Tensor
    mask: Tensor
    visible: Tensor
    noise: Tensor
    epsilon: float
    layers: list[Tensor]
    leaf: Tensor
    output: Tensor
    loss_gradient: Tensor

    @property
    def features(self) -> Tensor:
        """The clean features sg(E(x))."""
        return self.output.detach()


def clean_pass(model: MAE, images: Tensor, mask: Tensor, noise: Tensor, *, epsilon: float) -> Target:
    """The clean training forward of a batch, and its backward as far as the image.

    Args:
        model: A model with adapters.
        images: Normalised images, shape (batch, 3, height, width).
        mask: The masks, shape (batch, patches).
        noise: Starting noise of the attacks, shaped as the images.
        epsilon: L-infinity budget, in 1/255 of the pixel range.
    """
    leaf = images.detach().clone().requires_grad_()
    with recorded(model.encoder) as layers:
        outputs = model((leaf,), mask)
    loss = model.loss(outputs, (images,))
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    *layers, output = layers
    return Target(
        model=model,
        images=images,
        mask=mask,
        visible=visible_indices(mask, model.num_visible),
        noise=noise,
        epsilon=epsilon,
        layers=[tokens.detach() for tokens in layers],
        leaf=leaf,
        output=output,
        loss_gradient=gradient,
    )


class _ReachedError(Exception):
    """Ends a pass; holds what the block has returned."""


def truncated(encoder: MaskedViT, images: Tensor, visible: Tensor, depth: int) -> Tensor:
    """Run an encoder as far as a block; what comes after it costs nothing.

    Args:
        encoder: The encoder.
        images: Normalised images.
        visible: The visible patches.
        depth: Number of blocks, at least 1.

    Returns:
        What the last of them returns.
    """

    def leave(module: nn.Module, inputs: object, output: Tensor) -> None:
        raise _ReachedError(output)

    hook = encoder.blocks[depth - 1].register_forward_hook(leave)
    try:
        encoder(images, visible)
    except _ReachedError as reached:
        return reached.args[0]
    finally:
        hook.remove()
    raise AssertionError("the encoder has run past its blocks")


@contextmanager
def recorded(encoder: MaskedViT) -> Iterator[list[Tensor]]:
    """A list that fills as the encoder runs: what enters the blocks, what each returns, what it returns."""
    layers: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        layers.append(output)

    hooks = [encoder.blocks[0].register_forward_pre_hook(lambda module, inputs: layers.append(inputs[0]))]
    hooks += [module.register_forward_hook(keep) for module in (*encoder.blocks, encoder)]
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()
