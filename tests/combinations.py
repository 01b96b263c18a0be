"""What AEMIM is combined with, and what comes of it: the tests run over it, the README shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from composer.algorithms import (
    EMA,
    SAM,
    SWA,
    ChannelsLast,
    GradientClipping,
    LayerFreezing,
    ProgressiveResizing,
)
from composer.core import Algorithm
from composer.models import ComposerModel
from conftest import tiny_mae
from torch import Tensor, nn

__all__ = ["ELSEWHERE", "IN_ANY_ORDER", "Combination", "ConvolutionalMIM", "Verdict", "conv"]


class ConvolutionalMIM(ComposerModel):
    """Takes images of any size; batch normalization; its mask is drawn inside the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Masking(), nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.GELU())
        self.decoder = nn.Conv2d(6, 3, 1)

    def forward(self, batch: Any) -> Tensor:
        return self.decoder(self.encoder(batch[0]))

    def loss(self, outputs: Tensor, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        return (outputs - batch[0]).square().mean()


class Masking(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images * (torch.rand(len(images), 1, *images.shape[2:]) < 0.5)


def conv(seed: int = 0) -> ConvolutionalMIM:
    torch.manual_seed(seed)
    return ConvolutionalMIM()


@dataclass(frozen=True)
class Combination:
    """Another algorithm, before or after AEMIM in the list.

    Attributes:
        name: As in the README.
        algorithm: Makes it.
        verdict: What the tests show, beyond what holds for all.
        build: The model that they train.
        options: Of the training.
        rtol: How far a run with ``loss_ratio=1`` may be from the run of the other algorithm alone.
    """

    name: str
    algorithm: Callable[[], Algorithm]
    verdict: str
    build: Callable[[], ComposerModel] = tiny_mae
    options: dict[str, Any] = field(default_factory=dict)
    rtol: float = 0.0


_ROUNDING = "up to rounding: a norm over more gradients, though the others are zero"

IN_ANY_ORDER = [
    Combination("EMA", lambda: EMA(half_life="2ba"), "the copies are averaged, too; resumes"),
    Combination(
        "SWA",
        lambda: SWA("1ep", "3ep", "1ba"),
        "the copies are averaged, too; resumes",
        options={"momentum": True},
    ),
    Combination(
        "SAM",
        lambda: SAM(rho=0.1),
        f"both closures attack with the same noise; {_ROUNDING}",
        options={"momentum": True},
        rtol=1e-5,
    ),
    Combination(
        "GradientClipping, norm",
        lambda: GradientClipping("norm", 0.05),
        f"clips the gradient of both branches together; {_ROUNDING}",
        options={"momentum": True},
        rtol=1e-5,
    ),
    Combination("GradientClipping, value", lambda: GradientClipping("value", 1e-3), ""),
    Combination("GradientClipping, adaptive", lambda: GradientClipping("adaptive", 0.01), ""),
    Combination("ChannelsLast", ChannelsLast, "", build=conv),
    Combination(
        "ProgressiveResizing",
        lambda: ProgressiveResizing("crop", 0.5, 0.2, 0.2),
        "for models that take images of any size; the ViTs and Swins here refuse another one in one line",
        build=conv,
    ),
    Combination("LayerFreezing", lambda: LayerFreezing(0.0, 1.0), "a norm is frozen with its copy"),
]


@dataclass(frozen=True)
class Verdict:
    """A combination that has tests of its own: ``file::function`` below ``tests/``."""

    name: str
    verdict: str
    test: str


ELSEWHERE = [
    Verdict(
        "LowPrecisionLayerNorm",
        "right in any order: it is applied before the adapters (its float16 arithmetic needs a GPU and was "
        "not run)",
        "test_composition.py::test_low_precision_layernorm_keeps_the_adapters",
    ),
    Verdict(
        "GhostBatchNorm",
        "before AEMIM; after it, refused at INIT: it would replace the adapters",
        "test_composition.py::test_ghost_batch_norm_goes_first_or_is_refused",
    ),
    Verdict(
        "a second AEMIM",
        "refused at INIT",
        "test_composition.py::test_two_of_it_are_refused",
    ),
    Verdict(
        "an unknown algorithm that replaces adapters",
        "refused before the first batch",
        "test_composition.py::test_a_stranger_that_replaces_the_adapters_is_refused",
    ),
    Verdict(
        "activation checkpointing",
        "the gradients without it: Composer's, torch's wrapper and Hugging Face's, without reentrance; timm's own "
        "is refused",
        "test_recomputation.py::test_gradients_are_those_without_checkpointing",
    ),
    Verdict(
        "`device_train_microbatch_size`",
        "any split gives the gradient of the whole batch",
        "test_algorithm.py::test_micro_batches_add_up_to_the_batch",
    ),
    Verdict(
        "out of memory, retried with smaller micro-batches",
        "bitwise as if the batch had started with them, wherever it failed",
        "test_out_of_memory.py::test_a_retry_with_smaller_micro_batches_is_as_if_it_had_started_with_them",
    ),
    Verdict(
        "`amp_bf16`",
        "attack and adversarial pass run in it, too (on the CPU's autocast)",
        "test_composition.py::test_autocast_reaches_every_pass",
    ),
    Verdict(
        "float16 autocast, as in `amp_fp16`",
        "at feature distances of 1e-11, 97% of the pixels still move as in float32 (on the CPU's autocast)",
        "test_precision.py::test_half_precision_attacks_as_float32_does",
    ),
    Verdict(
        "`compile_config={}`",
        "the numbers of eager training, also where the mask is drawn inside the model",
        "test_compile.py::test_compiled_training_equals_eager_training",
    ),
    Verdict(
        "evaluation amid training, train metrics",
        "as without AEMIM; metrics see the clean outputs",
        "test_composition.py::test_train_metrics_see_the_clean_outputs",
    ),
]
