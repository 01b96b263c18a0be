"""One training batch of Algorithm 1: whom to attack, the attack, and the loss of both branches.

It holds what lives between the events of a batch, for a Trainer's loop or any other. The order of calls is
``start_batch``, then for each micro-batch ``watch``, the clean forward, ``stop_watching``, ``attack``,
``before_loss``, the clean loss and ``combine``. With a separate backward ``backward_clean`` and ``attack``
come after the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from aemim_algorithm.adapters import adversarial_mode, preserved_buffers
from aemim_algorithm.branch import AdversarialBranch, AdversarialPass, CleanPass
from aemim_algorithm.losses import total_loss
from aemim_algorithm.metrics import AttackMetrics, PixelRangeCheck
from aemim_algorithm.plan import BatchPlan, Share
from aemim_algorithm.randomness import RngState
from aemim_algorithm.samples import first_dimension
from aemim_algorithm.separate_backward import backward_clean, expect_weight, touching
from aemim_algorithm.sharding import unwrapped

__all__ = ["Strength", "TrainingStep"]

PrecisionContext = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Strength:
    """What may change from batch to batch.

    Attributes:
        epsilon: L-infinity budget ε, in 1/255 of the pixel range.
        adversarial_ratio: Share α of the batch that is attacked.
        loss_ratio: Weight λ of the clean loss.
    """

    epsilon: float
    adversarial_ratio: float
    loss_ratio: float


class TrainingStep:
    """The state of one batch after the other.

    Args:
        branch: Attacks the model that is trained.
        mean: Mean of the images' normalisation.
        std: Standard deviation of the images' normalisation.
    """

    def __init__(self, branch: AdversarialBranch, *, mean: Sequence[float], std: Sequence[float]) -> None:
        self.branch = branch
        self.result: AdversarialPass | None = None
        self.metrics = AttackMetrics()
        self.range = PixelRangeCheck(mean, std)
        self._plan: BatchPlan | None = None
        self._strength = Strength(0.0, 1.0, 1.0)
        self._before_loss = RngState.capture()
        self._share: Share | None = None
        self._clean: CleanPass | None = None
        self._weight_of_clean: float | Tensor | None = None  # in a backward of its own

    def start_batch(self, batch: Any, strength: Strength, *, number: int, seed: int) -> None:
        """Choose the samples of this rank's batch that will be attacked, and how.

        Args:
            batch: The whole batch of this rank.
            strength: The values of this batch.
            number: Number of the batch in the run.
            seed: Seed of the run, the same on every rank.
        """
        self._strength = strength
        ratio = strength.adversarial_ratio
        self._plan = BatchPlan(first_dimension(batch), ratio, seed=seed, number=number)
        self.restart()

    def restart(self) -> None:
        """Start with the first micro-batch, whatever became of an earlier attempt."""
        assert self._plan is not None, "start_batch comes first"
        self.branch.cancel()
        self._plan.rewind()
        self.metrics, self.result, self._clean = AttackMetrics(), None, None

    def watch(self) -> None:
        """The clean forward of a micro-batch comes next."""
        self.branch.start()

    def stop_watching(self, model: nn.Module, batch: Any, outputs: Any) -> None:
        """The clean forward has ended: choose whom to attack.

        Args:
            model: The model, with DDP's wrapper or without.
            batch: The micro-batch.
            outputs: What the clean forward returned.
        """
        assert self._plan is not None, "start_batch comes first"
        self._share = self._plan.take(self.branch.tap.batch_size or first_dimension(batch))
        self.result, self._weight_of_clean = None, None
        if self._share is None:
            self.branch.cancel()
        else:
            self._clean = self.branch.stop(unwrapped(model), outputs)

    def backward_clean(self, loss: Any, weight: float | Tensor) -> Any:
        """Run the clean branch's backward before the attack; not where nothing is attacked.

        Args:
            loss: What the model's loss returned for the clean outputs.
            weight: What the step's loss will be multiplied by.

        Returns:
            The loss, without its graph where that was used.
        """
        if self._share is None:
            return loss
        self._weight_of_clean = weight
        return backward_clean(loss, self._strength.loss_ratio * weight)

    def attack(self, model: nn.Module, batch: Any, precision: PrecisionContext = nullcontext) -> None:
        """Attack the chosen samples of the micro-batch; the result waits for the loss.

        Args:
            model: The model, with DDP's wrapper or without.
            batch: The micro-batch.
            precision: Makes the precision context of the passes.
        """
        clean, self._clean = self._clean, None  # its features need not live through the backward
        if self._share is None or clean is None:
            return
        # A second backward is exchanged if the wrapper was called for it.
        wrapped = self._weight_of_clean is not None and isinstance(model, DistributedDataParallel)
        self.result = self.branch.finish(
            unwrapped(model),
            batch,
            clean,
            epsilon=self._strength.epsilon,
            noise=self._share.noise,
            index=self._share.index,
            precision=precision,
            through=model if wrapped else None,
        )
        self.metrics.update(self.result, counted=self._share.weight > 0)
        self.range.update(self.result.clean_images)

    def before_loss(self) -> None:
        """The clean loss comes next: what it draws, the adversarial one shall draw, too."""
        self._before_loss = RngState.capture()

    def combine(self, model: nn.Module, loss: Any) -> dict[str, Tensor]:
        """λ·L_c + (1−λ)·L_a (Eq. 5); the target of L_a is the clean batch.

        Args:
            model: The model, with DDP's wrapper or without.
            loss: What the model's loss returned for the clean outputs.

        Returns:
            ``"total"``, ``"clean"`` and ``"adversarial"``, and the parts of the clean loss if it is a dict.
        """
        clean = total_loss(loss)
        adversarial = self._adversarial_loss(unwrapped(model), like=clean)
        ratio = self._strength.loss_ratio
        total = ratio * clean + (1 - ratio) * adversarial
        if self._weight_of_clean is not None:
            if isinstance(model, DistributedDataParallel) or not total.requires_grad:
                total = touching(total, model)
            expect_weight(total, self._weight_of_clean)
        named = {name: part.detach() for name, part in loss.items()} if isinstance(loss, Mapping) else {}
        return named | {"total": total, "clean": clean.detach(), "adversarial": adversarial.detach()}

    def _adversarial_loss(self, model: Any, like: Tensor) -> Tensor:
        result, self.result = self.result, None
        if result is None or self._share is None:
            return like.new_zeros(())
        after = RngState.capture()
        self._before_loss.restore()
        with adversarial_mode(model), preserved_buffers(model, clean_only=True):
            loss = self._share.weight * total_loss(model.loss(result.outputs, result.batch))
        after.restore()
        return loss
