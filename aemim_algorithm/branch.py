"""The adversarial branch of one training step, without a Trainer.

It costs T attack passes (an encoder forward, and a backward to the image only) and one more forward
and backward, all for the attacked share of the batch. The clean features come from the training
forward itself, so they cost nothing. Without attack steps (T=0) the images are noised instead, and what is
left is the forward and backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.profiler import record_function

from aemim_algorithm.adapters import adversarial_mode, preserved_buffers
from aemim_algorithm.attack import at_least_float32, linf_distance, pgd_attack, unit_gradient
from aemim_algorithm.injection import EncoderCall, EncoderTap
from aemim_algorithm.losses import DISTANCES, l2_distance, num_tokens, total_loss
from aemim_algorithm.randomness import RngState
from aemim_algorithm.samples import take_samples

__all__ = ["AdversarialBranch", "AdversarialPass", "CleanPass"]


@dataclass(frozen=True)
class AdversarialPass:
    """What the adversarial branch made of one batch.

    Attributes:
        images: Adversarial images x_a, normalised, shape (samples, ...), detached.
        clean_images: Their clean originals.
        batch: The clean batch of the chosen samples: the target of L_a (Eq. 5).
        outputs: The model's outputs for x_a, with gradient.
        distances: Feature distance for each sample from the start: of noise alone, then after each
            step, T + 1 tensors of shape (samples,); mean over tokens. After the last step only, if the
            attack's passes end before the encoder's features. None if there is no attack, and only one
            more clean pass could give these samples' features.
        perturbation: L-infinity distance of each sample, in 1/255, shape (samples,).
    """

    images: Tensor
    clean_images: Tensor
    batch: Any
    outputs: Any
    distances: tuple[Tensor, ...]
    perturbation: Tensor


@dataclass(frozen=True)
class CleanPass:
    """A clean forward pass as the attack sees it.

    Attributes:
        call: The encoder's call in it.
        mask: The mask that its outputs hold, as an argument of ``model.forward``; or nothing.
    """

    call: EncoderCall
    mask: dict[str, Tensor]


class AdversarialBranch:
    """Attacks the encoder's features and runs the model on the result.

    Args:
        tap: Tap on the model's encoder.
        steps: Attack steps T; 0 for the starting noise alone.
        step_size: Step μ, in 1/255; ``None`` is ``1.25 * epsilon / steps``.
        adversarial_loss: ``"l2"``, ``"kl"`` or ``"reconstruction"``.
        mean: Mean of the images' normalisation.
        std: Standard deviation of the images' normalisation.
    """

    def __init__(
        self,
        tap: EncoderTap,
        *,
        steps: int,
        step_size: float | None,
        adversarial_loss: str,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.tap = tap
        self.adversarial_loss = adversarial_loss
        self._attack: dict[str, Any] = dict(steps=steps, step_size=step_size, mean=mean, std=std)  # noqa: C408
        self._before: RngState | None = None

    def start(self) -> None:
        """Watch the clean forward pass that comes next."""
        self._before = RngState.capture()
        self.tap.start()

    def cancel(self) -> None:
        """Forget the clean forward pass: nothing of it is attacked."""
        self.tap.cancel()

    def stop(self, model: ComposerModel, outputs: Any) -> CleanPass:
        """The clean forward pass has ended.

        Args:
            model: The model, unwrapped.
            outputs: What it returned. A ``"mask"`` among them is given to ``model.forward`` again, if that
                takes an argument ``mask``; other masks are replayed from the generators.

        Returns:
            What :meth:`finish` needs of it; nothing of its graph.
        """
        return CleanPass(self.tap.stop(), _explicit_mask(model, outputs))

    def finish(
        self,
        model: ComposerModel,
        batch: Any,
        clean: CleanPass,
        *,
        epsilon: float,
        noise: Callable[[Tensor], Tensor],
        index: Tensor | None = None,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        through: nn.Module | None = None,
    ) -> AdversarialPass:
        """Attack the batch that was just run, and run the model on the adversarial images.

        The global generators end as they are found.

        Args:
            model: The model, unwrapped, in the mode of the clean forward.
            batch: The batch of the clean forward.
            clean: What :meth:`stop` returned after it.
            epsilon: L-infinity budget ε, in 1/255 of the pixel range.
            noise: Makes the starting noise, in [-1, 1] and shaped as the images it is given.
            index: The samples to attack, shape (samples,), int64; ``None`` for all.
            precision: Makes the precision context of the passes.
            through: What is called for the model's pass over the adversarial images, if not the model: a
                wrapper of it.

        Returns:
            The adversarial pass.
        """
        after = RngState.capture()
        call, mask = clean.call, clean.mask
        try:
            with precision():
                comparable = index is None or self._can_be_cut(clean)
                if index is not None:
                    size = call.images.shape[0]
                    batch, mask = take_samples((batch, mask), index, size)
                    if comparable or not self._attack["steps"]:
                        call = call.take(index)
                    else:
                        call, comparable = self._run_again(model, batch, mask), True
                step = _Step(model, batch, mask, call, comparable)
                return self._attack_and_forward(step, epsilon, noise, through or model)
        finally:
            after.restore()

    def _can_be_cut(self, clean: CleanPass) -> bool:
        """Whether some samples' features are those of a pass over these samples alone."""
        call = clean.call
        repeatable = call.deterministic and (bool(clean.mask) or call.rng == self._before)
        # A layer may hold the batch in another dimension, or windows in its place.
        cuttable = call.reference.shape[0] == call.images.shape[0]
        return repeatable and cuttable and not self.tap.sees_the_batch()

    def _run_again(self, model: ComposerModel, batch: Any, mask: _Mask) -> EncoderCall:
        """The encoder's clean call for some samples, if it can't be cut from the whole.

        The random numbers and the statistics of a smaller batch are others: the attack needs a reference
        under them.
        """
        assert self._before is not None
        self._before.restore()
        self.tap.start()
        with torch.no_grad(), preserved_buffers(model):
            model(batch, **mask)
        # Autocast has kept weights that it cast without gradient: the next passes would train none of them.
        torch.clear_autocast_cache()
        return self.tap.stop()

    def _attack_and_forward(
        self, step: _Step, epsilon: float, noise: Callable[[Tensor], Tensor], forward: Callable[..., Any]
    ) -> AdversarialPass:
        clean_images = step.call.images
        distances: list[Tensor] = []

        def objective(images: Tensor) -> Tensor:
            value, distance = self._objective(step, images)
            if not self.tap.ends_early:
                distances.append(distance)
            return value

        with adversarial_mode(step.model):
            with record_function("aemim/attack"), preserved_buffers(step.model):
                images = pgd_attack(
                    objective, clean_images, epsilon=epsilon, noise=noise(clean_images), **self._attack
                )
            with record_function("aemim/adversarial_forward"), preserved_buffers(step.model, clean_only=True):
                outputs, features = self._forward(step, images, forward)
        if step.comparable:
            distances.append(self._feature_distance(step, features))
        perturbation = linf_distance(images, clean_images, self._attack["std"])
        return AdversarialPass(images, clean_images, step.batch, outputs, tuple(distances), perturbation)

    def _objective(self, step: _Step, images: Tensor) -> tuple[Tensor, Tensor]:
        """The adversarial loss, summed over samples, and each sample's feature distance."""
        if self.adversarial_loss != "reconstruction":
            attacked = unit_gradient(self.tap.encode(step.call, images))
            return self._distance(attacked, step.call.reference, step.call.reference_dim)
        outputs, features = self._forward(step, images, step.model)
        # A sum over pixels, not a mean, for half precision's sake; a power of two rounds nothing.
        scale = images.shape[0] * 2 ** (images[0].numel().bit_length() - 1)
        loss = at_least_float32(total_loss(step.model.loss(outputs, step.batch))) * scale
        return loss, self._feature_distance(step, features)

    def _feature_distance(self, step: _Step, features: Tensor) -> Tensor:
        return self._distance(features.detach(), step.call.features, step.call.feature_dim)[1]

    def _distance(self, features: Tensor, reference: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """The distance to a reference, summed over samples; for each sample, a mean over tokens."""
        distance = DISTANCES.get(self.adversarial_loss, l2_distance)(features, reference, dim)
        return distance.sum(), distance.detach() / num_tokens(reference, dim)

    def _forward(self, step: _Step, images: Tensor, forward: Callable[..., Any]) -> tuple[Any, Tensor]:
        """The whole model on the clean batch, with ``images`` injected at the encoder."""
        assert self._before is not None
        self._before.restore()
        with self.tap.inject(images, step.call.rng) as features:
            return forward(step.batch, **step.mask), features()


_Mask = dict[str, Tensor]


@dataclass(frozen=True)
class _Step:
    """What the passes of one step share; the call's features are ``comparable`` if they are of its batch."""

    model: ComposerModel
    batch: Any
    mask: _Mask
    call: EncoderCall
    comparable: bool


def _explicit_mask(model: ComposerModel, outputs: Any) -> _Mask:
    """The mask of the clean outputs as an argument of ``model.forward``, or nothing."""
    mask = outputs.get("mask") if isinstance(outputs, Mapping) else None
    takes_mask = "mask" in inspect.signature(model.forward).parameters
    return {"mask": mask} if isinstance(mask, Tensor) and takes_mask else {}
