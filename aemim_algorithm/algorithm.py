"""AEMIM (Xiang et al. 2024, arXiv 2407.11537) as a Composer algorithm.

On every training batch it attacks the encoder's features of the images, and trains the same model to
reconstruct the clean images from the attacked ones as well, through its own copy of the normalization
layers.

- ``INIT``: adapters are added to the model and the optimizer, the encoder is tapped.
- ``BEFORE_FORWARD``, ``AFTER_FORWARD``: the clean pass is recorded, attacked, and run once more.
- ``BEFORE_LOSS``, ``AFTER_LOSS``: the loss becomes λ·clean + (1−λ)·adversarial.

With T=2 a step of MAE on ViT-B/16 costs 2.61 times its FLOPs; the fast variant 1.33 times. The activations of
both branches are held at once, or with ``separate_backward`` those of one at a time.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.optim import ComposerScheduler
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.optim import Optimizer

from aemim_algorithm.adapters import (
    ADAPTERS,
    adapters_of,
    apply_adapters,
    require_same_adapters,
)
from aemim_algorithm.branch import AdversarialBranch, AdversarialPass
from aemim_algorithm.checkpoints import adapt_state_dict, argument_differences
from aemim_algorithm.composition import (
    copy_again,
    freeze_twins,
    prepare_compiled,
    prepare_for,
)
from aemim_algorithm.early_exit import layer_of
from aemim_algorithm.finite import FiniteCheck
from aemim_algorithm.injection import EncoderTap
from aemim_algorithm.losses import DISTANCES
from aemim_algorithm.plan import noise_of
from aemim_algorithm.recomputation import repeat_what_forward_saw
from aemim_algorithm.repeat import RepeatedBatch
from aemim_algorithm.samples import first_dimension, map_tensors
from aemim_algorithm.schedule import Schedule, largest, parse_schedule, schedule_text, value_at
from aemim_algorithm.search import find_encoder, resolve_encoder
from aemim_algorithm.separate_backward import HeldBack, mean_batch_size, require_separable, weight_of
from aemim_algorithm.sharding import require_one_synchronisation, unwrapped
from aemim_algorithm.step import Strength, TrainingStep
from aemim_algorithm.validation import (
    require_choice,
    require_integer,
    require_number,
    require_per_channel,
)

__all__ = ["AEMIM"]

Scheduled = float | str | ComposerScheduler
"""A number, or a schedule: ``"linear 0→2 over 0.1dur"``, or Composer's linear or cosine scheduler."""


class AEMIM(Algorithm):
    """Train a masked-image model on adversarial examples, too.

    ``epsilon``, ``adversarial_ratio`` and ``loss_ratio`` may change during a run: each takes a number, a
    schedule such as ``"linear 0→2 over 0.1dur"`` or ``"cosine 1→0.5 over 20ep"``, or Composer's
    ``LinearScheduler`` or ``CosineAnnealingScheduler``.

    Args:
        epsilon: L-infinity budget ε of the attack, in 1/255 of the pixel range, in [0, 255].
        steps: Attack steps T. 0 for no attack, but uniform noise in the ball, which is what an attack starts
            from: the control that tells whether the attack matters.
        step_size: Length μ of an attack step, in 1/255, positive; ``None`` is ``1.25 * epsilon / steps``.
            Without steps it is not used.
        adversarial_ratio: Share α of a batch that gets an adversarial twin, in (0, 1].
        loss_ratio: Weight λ of the clean loss, in [0, 1]; the adversarial one has 1 − λ.
        adversarial_loss: What the attack maximises: the ``"l2"`` or ``"kl"`` distance of the encoder's
            features (Eq. 7), or the ``"reconstruction"`` loss. Without steps it only names the distance that
            is logged.
        adapter: What the branches do not share: ``"norm"`` for every normalization layer,
            ``"cls_token"`` for the class token, ``"both"``, ``"none"`` (paper, Table 8c).
        encoder: Dotted path of the module or method that turns images into features; ``None`` looks
            for ``encoder``, for Hugging Face's ``base_model_prefix``, then for the one submodule
            that images can enter.
        mean: Mean of the images' normalisation, one value for each channel, in [0, 1] pixels.
        std: Standard deviation of the images' normalisation, likewise, positive.
        attack_layer: Dotted path of a layer inside of the encoder, such as ``"encoder.blocks.2"``, at which
            the attack's passes end: they cost less, and raise the distance of that layer's output, and by it
            that of the features (docs/attack_cost.md). ``None`` for the encoder's end (Eq. 7).
        separate_backward: Whether the clean branch's backward runs before the attack, which brings peak
            memory down to about that of training without AEMIM; gradients are the same. FSDP2 reduces them
            twice a micro-batch.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        epsilon: Scheduled = 2.0,
        steps: int = 2,
        step_size: float | None = None,
        adversarial_ratio: Scheduled = 1.0,
        loss_ratio: Scheduled = 0.5,
        adversarial_loss: str = "l2",
        adapter: str = "norm",
        encoder: str | None = None,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        attack_layer: str | None = None,
        separate_backward: bool = False,
    ) -> None:
        self.epsilon = schedule_text(epsilon)
        self.steps = steps
        self.step_size = step_size
        self.adversarial_ratio = schedule_text(adversarial_ratio)
        self.loss_ratio = schedule_text(loss_ratio)
        self.adversarial_loss = adversarial_loss
        self.adapter = adapter
        self.encoder = encoder
        self.attack_layer = attack_layer
        self.separate_backward = separate_backward
        self._schedules = self._validate(mean, std)
        self.mean = tuple(mean)
        self.std = tuple(std)
        # What follows is the run's: neither an argument nor part of a checkpoint.
        self._model: ComposerModel | None = None
        self._step: TrainingStep | None = None
        self._now: dict[str, float] = {}
        self._repeated = RepeatedBatch()
        self._held_back, self._batch_size = HeldBack(), 1.0
        self._num_adapters, self._checked = 0, False

    def _validate(self, mean: Sequence[float], std: Sequence[float]) -> dict[str, float | Schedule]:
        unit = " (1/255 of the pixel range)"
        require_integer("steps", self.steps, low=0)
        if self.step_size is not None:
            require_number("step_size", self.step_size, low=0, low_open=True, unit=" (1/255)")
        require_choice("adversarial_loss", self.adversarial_loss, [*DISTANCES, "reconstruction"])
        require_choice("adapter", self.adapter, ADAPTERS)
        require_per_channel("mean", mean)
        require_per_channel("std", std, positive=True)
        if self.encoder is not None and not isinstance(self.encoder, str):
            raise ValueError(f"encoder={self.encoder!r}: expected a dotted path such as 'model.encoder'")
        if self.attack_layer is not None and not isinstance(self.attack_layer, str):
            raise ValueError(
                f"attack_layer={self.attack_layer!r}: expected a dotted path such as 'encoder.blocks.2'"
            )
        if self.attack_layer is not None and self.adversarial_loss == "reconstruction":
            raise ValueError(
                "attack_layer with adversarial_loss='reconstruction', which needs the whole model: choose one"
            )
        if self.attack_layer is not None and self.steps == 0:
            raise ValueError(
                "attack_layer with steps=0, which is noise without an attack: leave one of them out"
            )
        if not isinstance(self.separate_backward, bool):
            raise ValueError(f"separate_backward={self.separate_backward!r}: expected True or False")
        ratio = self.adversarial_ratio
        return {
            "epsilon": parse_schedule("epsilon", self.epsilon, low=0, high=255, unit=unit),
            "adversarial_ratio": parse_schedule("adversarial_ratio", ratio, low=0, high=1, low_open=True),
            "loss_ratio": parse_schedule("loss_ratio", self.loss_ratio, low=0, high=1),
        }

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
            ValueError: If the model has no encoder or nothing to adapt, or checkpoints its activations in
                a way that cannot be repeated.
        """
        path = self.encoder or find_encoder(model, channels=len(self.mean))
        owner, _, encoder = resolve_encoder(model, path)  # before anything is changed
        module = encoder if isinstance(encoder, torch.nn.Module) else owner
        if self.attack_layer is not None:
            layer_of(model, self.attack_layer, module)
        repeat_what_forward_saw(model, module)
        require_same_adapters(model, self.adapter)
        self._num_adapters = apply_adapters(model, self.adapter, optimizers)
        if self._model is not model:
            self._model, self._checked = model, False
            model.register_load_state_dict_pre_hook(adapt_state_dict)
            branch = AdversarialBranch(
                EncoderTap(model, path, self.attack_layer),
                steps=self.steps,
                step_size=self.step_size,
                adversarial_loss=self.adversarial_loss,
                mean=self.mean,
                std=self.std,
            )
            self._step = TrainingStep(branch, mean=self.mean, std=self.std)

    def present(self, name: str) -> float:
        """The value of an argument that may be a schedule.

        Args:
            name: ``"epsilon"``, ``"adversarial_ratio"`` or ``"loss_ratio"``.

        Returns:
            Its value in the present batch; before the first one, the largest that it will have.
        """
        return self._now.get(name, largest(self._schedules[name]))

    def training_loss(
        self, model: ComposerModel, batch: Any, *, step: int, seed: int = 0, weight: float = 1.0
    ) -> dict[str, Tensor]:
        """One whole step of Algorithm 1 up to the loss, for a loop without a Trainer.

        With ``separate_backward`` the clean branch's gradients are in ``.grad`` when it returns, and the
        backward of the total adds the others; after an error call ``zero_grad``.

        Args:
            model: A model that this object is attached to, in training mode.
            batch: A batch of the model.
            step: Number of the batch in the run: noise and choice depend on it.
            seed: Seed of the run.
            weight: With ``separate_backward``, what the total is multiplied by before its backward: 1/4 for
                a quarter of a batch, times a gradient scaler's factor.

        Raises:
            ValueError: If an argument is a schedule: those need a Trainer's time.

        Returns:
            ``"total"`` (λ·clean + (1−λ)·adversarial, with gradient), ``"clean"`` and
            ``"adversarial"``, scalars; and the parts of the clean loss if it is a dict.
        """
        current = self._get_step()
        current.start_batch(batch, self._strength(None), number=step, seed=seed)
        with self._watched():
            outputs = model(batch)
        separate = self.separate_backward and torch.is_grad_enabled()
        current.stop_watching(model, batch, outputs)
        if not separate:
            current.attack(model, batch)
        current.before_loss()
        loss = model.loss(outputs, batch)
        if separate:
            del outputs
            loss = current.backward_clean(loss, weight)
            current.attack(model, batch)
        current.range.warn_once()
        return current.combine(model, loss)

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
        with self._watched():
            outputs = model(batch)
        epsilon = self.present("epsilon")
        noise = noise_of(seed=seed, number=step, positions=torch.arange(first_dimension(batch)))
        branch = self._get_step().branch
        return outputs, branch.finish(model, batch, branch.stop(model, outputs), epsilon=epsilon, noise=noise)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare the arguments with those of the run that saved ``state``; warn of differences."""
        parameters = inspect.signature(type(self)).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        present = self._arguments()
        del present["separate_backward"]  # trains the same
        differences = argument_differences(str(state.get("repr", "")), present, defaults)
        if differences:
            warnings.warn(
                f"AEMIM continues a run with other arguments: {'; '.join(differences)}", stacklevel=2
            )

    def _on_init(self, state: State, logger: Logger) -> None:
        if state.fsdp_enabled and not adapters_of(state.model):
            raise ValueError(
                "FSDP has sharded the model before AEMIM could add its adapters, as when a checkpoint brings "
                "AEMIM along: pass AEMIM to the Trainer, algorithms=[AEMIM(...)]"
            )
        prepare_for(self, state, logger)
        self.attach(unwrapped(state.model), state.optimizers)
        copy_again(self, state, logger)
        if not any(isinstance(callback, FiniteCheck) for callback in state.callbacks):
            state.callbacks.append(FiniteCheck())

    def _on_batch_start(self, state: State, logger: Logger) -> None:
        if not self._checked:  # the model is wrapped and compiled by now
            self._check_model(state)
        number = int(state.timestamp.batch)
        self._get_step().start_batch(
            state.batch, self._strength(state), number=number, seed=state.rank_zero_seed
        )
        if self.separate_backward:
            self._batch_size = mean_batch_size(state, first_dimension(state.batch))
        self._repeated.start_batch()

    def _on_before_train_batch(self, state: State, logger: Logger) -> None:
        # Once a batch, on each call of an optimizer's closure, and on each attempt at a batch.
        self._repeated.start_attempt(state)
        self._get_step().restart()

    def _on_before_forward(self, state: State, logger: Logger) -> None:
        require_one_synchronisation(state.model)
        self._get_step().watch()
        if self.separate_backward:
            self._held_back.hold(state.model)

    def _on_after_forward(self, state: State, logger: Logger) -> None:
        step = self._get_step()
        step.stop_watching(state.model, state.batch, state.outputs)
        if not self.separate_backward:
            step.attack(state.model, state.batch, _precision(state))

    def _on_before_loss(self, state: State, logger: Logger) -> None:
        self._get_step().before_loss()

    def _on_after_loss(self, state: State, logger: Logger) -> None:
        step = self._get_step()
        if self.separate_backward:
            state.loss = step.backward_clean(state.loss, weight_of(state, self._batch_size))
            # What is left of the clean graph shall not live through the attack.
            state.outputs = map_tensors(state.outputs, Tensor.detach)
            step.attack(state.model, state.batch, _precision(state))
        with _precision(state)():
            state.loss = step.combine(state.model, state.loss)

    def _on_after_train_batch(self, state: State, logger: Logger) -> None:
        step = self._get_step()
        step.range.warn_once()
        scheduled = {
            f"aemim/{name}": self.present(name)
            for name, value in self._schedules.items()
            if isinstance(value, Schedule)
        }
        logger.log_metrics(step.metrics.compute() | scheduled)

    def _on_epoch_checkpoint(self, state: State, logger: Logger) -> None:
        freeze_twins(state)

    _handlers = {  # noqa: RUF012 - a constant
        Event.INIT: _on_init,
        Event.BATCH_START: _on_batch_start,
        Event.BEFORE_TRAIN_BATCH: _on_before_train_batch,
        Event.BEFORE_FORWARD: _on_before_forward,
        Event.AFTER_FORWARD: _on_after_forward,
        Event.BEFORE_LOSS: _on_before_loss,
        Event.AFTER_LOSS: _on_after_loss,
        Event.AFTER_TRAIN_BATCH: _on_after_train_batch,
        Event.EPOCH_CHECKPOINT: _on_epoch_checkpoint,
    }

    def _check_model(self, state: State) -> None:
        """What can be seen only after INIT, before the first batch."""
        model = state.model
        tap = self._get_step().branch.tap
        checkpointed = repeat_what_forward_saw(model, tap.module)
        prepare_compiled(unwrapped(model), checkpointed=checkpointed > 0)
        tap.prepare_sharded(unwrapped(model))
        if self.separate_backward:
            require_separable(model, state)
        if len(adapters_of(model)) < self._num_adapters:
            raise ValueError(
                "another algorithm has replaced adapters of AEMIM: pass AEMIM after it in algorithms=[...]"
            )
        self._checked = True

    def _strength(self, state: State | None) -> Strength:
        self._now = {name: value_at(state, name, value) for name, value in self._schedules.items()}
        return Strength(**self._now)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """The clean forward pass is inside; if it fails, nothing of it is kept."""
        step = self._get_step()
        step.watch()
        try:
            yield
        except BaseException:
            step.branch.cancel()
            raise

    def _get_step(self) -> TrainingStep:
        if self._step is None:
            raise RuntimeError("AEMIM is not attached to a model: call attach(model) first")
        return self._step

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


def _precision(state: State) -> Callable[[], AbstractContextManager[Any]]:
    """The Trainer's autocast: events run outside of it."""
    return partial(get_precision_context, state.precision, state.precision_config)
