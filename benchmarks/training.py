"""One training step of a masked-image model, with AEMIM or without it, and without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from bare import BarePasses
from composer.models import ComposerModel
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.profiler import record_function

from aemim_algorithm import AEMIM
from aemim_algorithm.losses import total_loss
from aemim_algorithm.models import MODELS

__all__ = ["BARE", "BATCH_MULTIPLE", "METHODS", "PLAIN", "Settings", "Training", "build", "random_batch"]

PLAIN = "plain"

METHODS: dict[str, Callable[[], AEMIM | None]] = {
    PLAIN: lambda: None,
    "noise": partial(AEMIM, steps=0),
    "AEMIM T=1": partial(AEMIM, steps=1),
    "AEMIM": AEMIM,
    "AEMIM T=3": partial(AEMIM, steps=3),
    "AEMIM, separate": partial(AEMIM, separate_backward=True),
    "AEMIM, early layer": partial(AEMIM, attack_layer="encoder.blocks.2", step_size=4.0),
    "Fast AEMIM": AEMIM.fast,
}
"""By name; ``"AEMIM"`` is the standard one, T=2, and ``"noise"`` its random start without an attack."""

BARE = {"AEMIM, bare": "AEMIM", "Fast AEMIM, bare": "Fast AEMIM"}
"""Contenders that do the passes of a method by hand (`bare.py`)."""

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
        options: Arguments of the model that differ from those of its name.
    """

    model: str
    micro_batch: int
    precision: str
    device: str
    threads: int
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)


class Training:
    """One method's model, optimizer and batch."""

    def __init__(self, method: str, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.model = build(settings)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True
        )
        self.batch = random_batch(self.model, settings)
        self.steps = 0
        algorithm = METHODS[BARE.get(method, method)]()
        self._loss: Callable[[], Tensor]
        if algorithm is None:
            self._loss = self._plain_loss
        elif method in BARE:
            self._loss = partial(BarePasses(self.model, self.optimizer, algorithm).loss, self.batch)
        else:
            algorithm.attach(self.model, self.optimizer)
            self._loss = partial(self._aemim_loss, algorithm)

    def backward(self) -> None:
        """Forward, loss and backward."""
        bf16 = self.settings.precision == "bf16"
        with torch.autocast(self.settings.device, dtype=torch.bfloat16, enabled=bf16):
            loss = self._loss()
        with record_function("step/backward"):
            loss.backward()

    def step(self) -> None:
        """One training step."""
        self.backward()
        with record_function("step/optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.steps += 1

    def _plain_loss(self) -> Tensor:
        return total_loss(self.model.loss(self.model(self.batch), self.batch))

    def _aemim_loss(self, algorithm: AEMIM) -> Tensor:
        return algorithm.training_loss(self.model, self.batch, step=self.steps)["total"]


def build(settings: Settings) -> ComposerModel:
    """The model, in training mode."""
    with torch.device(settings.device):
        model = MODELS[settings.model](**settings.options)
    return model.to(settings.device).train()


def random_batch(model: Any, settings: Settings) -> tuple[Tensor, Tensor]:
    """Uniform random pixels, normalised, and labels that nothing reads."""
    height, width = model.encoder.patch_embed.img_size
    pixels = torch.rand(settings.micro_batch, 3, height, width, device=settings.device)
    mean, std = (
        torch.tensor(values, device=settings.device).view(3, 1, 1)
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    labels = torch.zeros(settings.micro_batch, dtype=torch.int64, device=settings.device)
    return (pixels - mean) / std, labels
