"""One training step of MAE, AEMIM or Fast AEMIM without a Trainer, to be timed and counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from aemim_algorithm import AEMIM
from aemim_algorithm.models import MAE, MODELS
from aemim_algorithm.recipes.estimate import step_flops

__all__ = ["BATCH_MULTIPLE", "METHODS", "Settings", "Training", "bound_flops", "counted_flops"]

METHODS: dict[str, Callable[[], AEMIM | None]] = {
    "MAE": lambda: None,
    "AEMIM": AEMIM,
    "Fast AEMIM": AEMIM.fast,
}
# Fast AEMIM attacks one of four images; less would leave it nothing to attack.
BATCH_MULTIPLE = 4


@dataclass(frozen=True)
class Settings:
    """What a worker needs to know.

    Attributes:
        model: Key of ``MODELS``.
        micro_batch: Images per step, a multiple of 4.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads.
        seed: Of weights, images and masks.
    """

    model: str
    micro_batch: int
    precision: str
    device: str
    threads: int
    seed: int


class Training:
    """One method's model, optimizer and batch."""

    def __init__(self, method: str, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.model = build(settings)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True
        )
        self.algorithm = METHODS[method]()
        if self.algorithm is not None:
            self.algorithm.attach(self.model, self.optimizer)
        self.batch = random_batch(self.model, settings)
        self.steps = 0

    def backward(self) -> None:
        """Forward, loss and backward."""
        bf16 = self.settings.precision == "bf16"
        with torch.autocast(self.settings.device, dtype=torch.bfloat16, enabled=bf16):
            loss = self._loss()
        loss.backward()

    def step(self) -> None:
        """One training step."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def _loss(self) -> Tensor:
        if self.algorithm is None:
            return self.model.loss(self.model(self.batch), self.batch)
        losses = self.algorithm.training_loss(self.model, self.batch, step=self.steps)
        return losses["total"]


def build(settings: Settings) -> MAE:
    """The model, in training mode."""
    with torch.device(settings.device):
        model = MODELS[settings.model]().to(settings.device).train()
    assert isinstance(model, MAE)
    return model


def random_batch(model: MAE, settings: Settings) -> tuple[Tensor, Tensor]:
    """Uniform random pixels, normalised, and labels that nothing reads."""
    height, width = model.encoder.patch_embed.img_size
    pixels = torch.rand(settings.micro_batch, 3, height, width, device=settings.device)
    mean, std = (
        torch.tensor(values, device=settings.device).view(3, 1, 1)
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    labels = torch.zeros(settings.micro_batch, dtype=torch.int64, device=settings.device)
    return (pixels - mean) / std, labels


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of matrix products; a multiply-add is two.

    torch's own ``FlopCounterMode`` hooks every module call to tell modules apart, and these hooks
    refuse a gradient with respect to the image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator and add what torch's registry of formulas says of it."""
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops_of(run: Callable[[], Any]) -> int:
    """FLOPs of a call; attention as explicit products, since the CPU's fused kernel has no formula."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
        run()
    return counter.total


def counted_flops(settings: Settings) -> dict[str, float]:
    """FLOPs per image of each method's forward and backward, counted as they run."""
    return {
        method: flops_of(Training(method, settings).backward) / settings.micro_batch for method in METHODS
    }


def bound_flops(settings: Settings) -> dict[str, float]:
    """FLOPs per image that Algorithm 1 needs at least, from counts of its single passes.

    Returns:
        By method, and ``"naive"``: AEMIM with a second clean encoder pass for its reference
        features.
    """
    settings = replace(settings, device="meta")  # nothing has to be computed
    model = build(settings)
    batch = random_batch(model, settings)
    with sdpa_kernel(SDPBackend.MATH):
        bound = {name: step_flops(model, batch, make()) for name, make in METHODS.items()}
    visible = torch.arange(model.num_visible, device=settings.device)
    visible = visible.expand(settings.micro_batch, -1)
    bound["naive"] = bound["AEMIM"] + flops_of(lambda: model.encoder(batch[0], visible))
    return {name: flops / settings.micro_batch for name, flops in bound.items()}
