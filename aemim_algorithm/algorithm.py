"""AEMIM (Xiang et al. 2024, arXiv 2407.11537) as a Composer algorithm.

On every training batch it attacks the encoder's features of the images, and trains the same model to
reconstruct the clean images from the attacked ones as well, through its own copy of the normalization
layers.

- ``INIT``: adapters are added to the model and the optimizer, the encoder is tapped.
- ``BEFORE_FORWARD``, ``AFTER_FORWARD``: the clean pass is recorded, attacked, and run once more.
- ``AFTER_LOSS``: the loss becomes λ·clean + (1−λ)·adversarial.

With T=2 a step of MAE on ViT-B/16 costs 2.60 times its FLOPs; the fast variant 1.33 times.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import dist
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from aemim_algorithm.adapters import ADAPTERS, apply_adapters, require_no_checkpointing
from aemim_algorithm.attack import outside_pixel_range
from aemim_algorithm.branch import AdversarialBranch, AdversarialPass
from aemim_algorithm.injection import EncoderTap, find_encoder, first_dimension, resolve_encoder
from aemim_algorithm.losses import DISTANCES, total_loss
from aemim_algorithm.metrics import AttackMetrics, FiniteLossCheck
from aemim_algorithm.randomness import RngState, choose_samples, uniform_noise
from aemim_algorithm.validation import (
    require_choice,
    require_integer,
    require_number,
    require_per_channel,
)

__all__ = ["AEMIM"]


class AEMIM(Algorithm):
    """Train a masked-image model on adversarial examples, too.

    Args:
        epsilon: L-infinity budget ε of the attack, in 1/255 of the pixel range, in [0, 255].
        steps: Attack steps T, at least 1.
        step_size: Length μ of an attack step, in 1/255, positive; ``None`` is ``1.25 * epsilon / steps``.
        adversarial_ratio: Share α of a batch that gets an adversarial twin, in (0, 1].
        loss_ratio: Weight λ of the clean loss, in [0, 1]; the adversarial one has 1 − λ.
        adversarial_loss: What the attack maximises: the ``"l2"`` or ``"kl"`` distance of the encoder's
            features (Eq. 7), or the ``"reconstruction"`` loss.
        adapter: What the branches do not share: ``"norm"`` for every normalization layer,
            ``"cls_token"`` for the class token, ``"none"`` (paper, Table 8c).
        encoder: Dotted path of the module or method that turns images into features; ``None`` looks
            for ``encoder``, then for Hugging Face's ``base_model_prefix``.
        mean: Mean of the images' normalisation, one value for each channel, in [0, 1] pixels.
        std: Standard deviation of the images' normalisation, likewise, positive.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        epsilon: float = 2.0,
        steps: int = 2,
        step_size: float | None = None,
        adversarial_ratio: float = 1.0,
        loss_ratio: float = 0.5,
        adversarial_loss: str = "l2",
        adapter: str = "norm",
        encoder: str | None = None,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        require_number("epsilon", epsilon, low=0, high=255, unit=" (1/255 of the pixel range)")
        require_integer("steps", steps, low=1)
        if step_size is not None:
            require_number("step_size", step_size, low=0, low_open=True, unit=" (1/255)")
        require_number("adversarial_ratio", adversarial_ratio, low=0, high=1, low_open=True)
        require_number("loss_ratio", loss_ratio, low=0, high=1)
        require_choice("adversarial_loss", adversarial_loss, [*DISTANCES, "reconstruction"])
        require_choice("adapter", adapter, ADAPTERS)
        require_per_channel("mean", mean)
        require_per_channel("std", std, positive=True)
        if encoder is not None and not isinstance(encoder, str):
            raise ValueError(f"encoder={encoder!r}: expected a dotted path such as 'model.encoder'")
        self.epsilon = epsilon
        self.steps = steps
        self.step_size = step_size
        self.adversarial_ratio = adversarial_ratio
        self.loss_ratio = loss_ratio
        self.adversarial_loss = adversarial_loss
        self.adapter = adapter
        self.encoder = encoder
        self.mean = tuple(mean)
        self.std = tuple(std)
        # What follows is the run's: neither an argument nor part of a checkpoint.
        self._model: ComposerModel | None = None
        self._branch: AdversarialBranch | None = None
        self._result: AdversarialPass | None = None
        self._metrics, self._finite = AttackMetrics(), FiniteLossCheck()
        self._excess: Tensor | None = None
        self._range_warned = False
        self._checkpointing_checked = False

    @classmethod
    def fast(cls, **overrides: Any) -> AEMIM:
        """The paper's fast variant: one attack step, on a quarter of each batch.

        Args:
            **overrides: Arguments of :class:`AEMIM` that differ from it.
        """
        return cls(**({"steps": 1, "adversarial_ratio": 0.25} | overrides))

    def match(self, event: Event, state: State) -> bool:
        """Runs at ``INIT`` and on the events of a training batch."""
        return event in self._handlers

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Hand the event to its method."""
        self._handlers[event](self, state, logger)

    @staticmethod
    def required_on_load() -> bool:
        """A checkpoint with adapters loads only into a model with adapters."""
        return True

    def attach(self, model: ComposerModel, optimizers: Optimizer | Iterable[Optimizer] | None = None) -> None:
        """Add the adapters to a model and its optimizers and tap its encoder; twice is once.

        Args:
            model: The model to train, unwrapped.
            optimizers: The optimizers that train it, if they exist already.

        Raises:
            ValueError: If the model has no encoder, nothing to adapt, or checkpoints its activations.
        """
        path = self.encoder or find_encoder(model)
        resolve_encoder(model, path)  # before anything is changed
        require_no_checkpointing(model)
        apply_adapters(model, self.adapter, optimizers)
        if self._model is not model:
            self._model, self._checkpointing_checked = model, False
            self._branch = AdversarialBranch(
                EncoderTap(model, path),
                epsilon=self.epsilon,
                steps=self.steps,
                step_size=self.step_size,
                adversarial_loss=self.adversarial_loss,
                mean=self.mean,
                std=self.std,
            )

    def training_loss(
        self, model: ComposerModel, batch: Any, *, step: int, seed: int = 0
    ) -> dict[str, Tensor]:
        """One whole step of Algorithm 1 up to the loss, for a loop without a Trainer.

        Args:
            model: A model that this object is attached to, in training mode.
            batch: A batch of the model.
            step: Number of the batch in the run: noise and choice depend on it.
            seed: Seed of the run.

        Returns:
            ``"total"`` (λ·clean + (1−λ)·adversarial, with gradient), ``"clean"`` and
            ``"adversarial"``, scalars; and the parts of the clean loss if it is a dict.
        """
        self._start_batch(batch, step, seed)
        self._get_branch().start()
        outputs = model(batch)
        self._run_branch(model, batch, outputs)
        self._warn_once_of_range()
        return self._combine(model, model.loss(outputs, batch))

    def attack(
        self, model: ComposerModel, batch: Any, *, step: int, seed: int = 0
    ) -> tuple[Any, AdversarialPass]:
        """Run a batch clean and attack all of it, without training on it.

        Args:
            model: A model that this object is attached to.
            batch: A batch of the model.
            step: Number that decides the noise, together with ``seed``.
            seed: Seed of the noise.

        Returns:
            The clean outputs, and the adversarial pass.
        """
        branch = self._get_branch()
        branch.start()
        outputs = model(batch)
        positions = torch.arange(first_dimension(batch))
        noise = partial(_noise, seed=seed, batch=step, positions=positions)
        return outputs, branch.finish(model, batch, outputs, noise=noise)

    def _on_init(self, state: State, logger: Logger) -> None:
        self.attach(_unwrapped(state.model), state.optimizers)

    def _on_batch_start(self, state: State, logger: Logger) -> None:
        self._start_batch(state.batch, int(state.timestamp.batch), state.rank_zero_seed)

    def _on_before_train_batch(self, state: State, logger: Logger) -> None:
        # Also on a retry with smaller micro-batches, and on each call of an optimizer's closure.
        self._seen, self._metrics, self._finite = 0, AttackMetrics(), FiniteLossCheck()
        self._result = None
        if not self._checkpointing_checked:  # Composer wraps after INIT
            require_no_checkpointing(state.model)
            self._checkpointing_checked = True

    def _on_before_forward(self, state: State, logger: Logger) -> None:
        self._get_branch().start()

    def _on_after_forward(self, state: State, logger: Logger) -> None:
        # Events run outside of the Trainer's autocast.
        precision = partial(get_precision_context, state.precision, state.precision_config)
        self._run_branch(_unwrapped(state.model), state.batch, state.outputs, precision)

    def _on_after_loss(self, state: State, logger: Logger) -> None:
        with get_precision_context(state.precision, state.precision_config):
            state.loss = self._combine(_unwrapped(state.model), state.loss)
        self._finite.update(state.loss)

    def _on_after_train_batch(self, state: State, logger: Logger) -> None:
        self._finite.require_finite(int(state.timestamp.batch))
        self._warn_once_of_range()
        logger.log_metrics(self._metrics.compute())

    _handlers = {  # noqa: RUF012 - a constant
        Event.INIT: _on_init,
        Event.BATCH_START: _on_batch_start,
        Event.BEFORE_TRAIN_BATCH: _on_before_train_batch,
        Event.BEFORE_FORWARD: _on_before_forward,
        Event.AFTER_FORWARD: _on_after_forward,
        Event.AFTER_LOSS: _on_after_loss,
        Event.AFTER_TRAIN_BATCH: _on_after_train_batch,
    }

    def _start_batch(self, batch: Any, number: int, seed: int) -> None:
        """Choose the samples of this rank's batch that will be attacked."""
        self._seed, self._batch, self._seen = seed, number, 0
        self._batch_size = first_dimension(batch)
        self._first = dist.get_global_rank() * self._batch_size
        self._chosen = choose_samples(
            self._batch_size, self.adversarial_ratio, seed=seed, batch=number, first=self._first
        )

    def _run_branch(
        self,
        model: ComposerModel,
        batch: Any,
        outputs: Any,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Attack the chosen samples of a micro-batch; the result waits for the loss."""
        branch, first = self._get_branch(), self._seen
        size = branch.tap.batch_size or first_dimension(batch)
        self._seen += size
        if self._seen > self._batch_size:
            raise ValueError(
                f"the encoder has seen {self._seen} images of a batch of {self._batch_size}: AEMIM takes the "
                "batch size from the first tensor of the batch that can be images; put the images first"
            )
        index = self._chosen[(self._chosen >= first) & (self._chosen < first + size)] - first
        # Over the *expected* number: a mean over what happens to be chosen would weight samples
        # unequally, and micro-batches would not add up to the batch's gradient.
        self._weight = len(index) * self._batch_size / (len(self._chosen) * size)
        if len(index) == 0 and dist.get_world_size() > 1:
            index = torch.zeros(1, dtype=torch.int64)  # ranks must run the same passes: weight 0
        if len(index) == 0:
            branch.cancel()
            self._result = None
            return
        self._result = branch.finish(
            model,
            batch,
            outputs,
            noise=partial(_noise, seed=self._seed, batch=self._batch, positions=index + self._first + first),
            index=None if len(index) == size else index,
            precision=precision,
        )
        if self._weight > 0:
            self._metrics.update(self._result)
        self._look_at_range(self._result.clean_images)

    def _combine(self, model: ComposerModel, loss: Any) -> dict[str, Tensor]:
        """λ·L_c + (1−λ)·L_a (Eq. 5); the target of L_a is the clean batch."""
        clean = total_loss(loss)
        result, self._result = self._result, None
        if result is None:
            adversarial = torch.zeros_like(clean)
        else:
            rng = RngState.capture()
            adversarial = self._weight * total_loss(model.loss(result.outputs, result.batch))
            rng.restore()
        total = self.loss_ratio * clean + (1 - self.loss_ratio) * adversarial
        named = {name: part.detach() for name, part in loss.items()} if isinstance(loss, Mapping) else {}
        return named | {"total": total, "clean": clean.detach(), "adversarial": adversarial.detach()}

    def _look_at_range(self, images: Tensor) -> None:
        if not self._range_warned:
            excess = outside_pixel_range(images, self.mean, self.std)
            self._excess = excess if self._excess is None else self._excess.maximum(excess)

    def _warn_once_of_range(self) -> None:
        """Waits for the device, so once a batch, and no more after the warning."""
        if self._excess is None:
            return
        excess, self._excess = self._excess.item(), None
        if excess > 0.01:
            self._range_warned = True
            warnings.warn(
                f"AEMIM: the images leave the pixel range [0, 1] by {excess:.2f} after undoing "
                f"mean={self.mean} and std={self.std}: pass AEMIM(mean=..., std=...) the values that "
                "the images were normalised with, or epsilon will not be 1/255 of the pixel range",
                stacklevel=2,
            )

    def _get_branch(self) -> AdversarialBranch:
        if self._branch is None:
            raise RuntimeError("AEMIM is not attached to a model: call attach(model) first")
        return self._branch

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())
        return f"{type(self).__name__}({given})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AEMIM) and self._arguments() == other._arguments()

    def __hash__(self) -> int:
        return hash(repr(self))

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy starts unattached: hooks and tensors of a run belong to its model.
        return partial(type(self), **self._arguments()), ()


def _noise(images: Tensor, *, seed: int, batch: int, positions: Tensor) -> Tensor:
    positions = positions.to(images.device)
    return uniform_noise(images.shape, seed=seed, batch=batch, positions=positions)


def _unwrapped(model: Any) -> ComposerModel:
    # DDP's own forward must run once a step; the second pass goes to the module inside.
    return model.module if isinstance(model, DistributedDataParallel) else model
