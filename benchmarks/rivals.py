"""MAE as its users have it: ours, Hugging Face's and the original code, each in a plain PyTorch loop.

The same model, batch and precision in all: the sizes are those of our `MODELS`, three quarters of the patches
are hidden, the target is normalised by patch, there is no dropout. The batch is in memory already.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from flops import flops_of
from original_mae import build_original
from torch import Tensor, nn
from turns import synchronize

from aemim_algorithm.models import MODELS

__all__ = [
    "CONTENDERS",
    "Contender",
    "Loop",
    "Setup",
    "flops_per_image",
    "trained_parameters",
    "turns_of",
]

ADAMW: dict[str, Any] = {"lr": 1.5e-4, "betas": (0.9, 0.95), "weight_decay": 0.05}


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        code: ``"ours"``, ``"huggingface"`` or ``"original"``.
        fused: Whether AdamW is told to be one kernel; else it is what PyTorch chooses.
        attention: Of Hugging Face's model; ``"sdpa"`` is its default.
        compiled: Whether the model's forward goes through torch.compile.
    """

    code: str
    fused: bool = False
    attention: str = "sdpa"
    compiled: bool = False


CONTENDERS = {
    "ours": Contender("ours", fused=True),
    "Hugging Face": Contender("huggingface"),
    "Hugging Face, eager attention": Contender("huggingface", attention="eager"),
    "Hugging Face, fused AdamW": Contender("huggingface", fused=True),
    "original MAE": Contender("original"),
    "ours, compiled": Contender("ours", fused=True, compiled=True),
    "Hugging Face, compiled": Contender("huggingface", compiled=True),
}


@dataclass(frozen=True)
class Setup:
    """What is the same for all contenders.

    Attributes:
        model: Key of ``MODELS``, a MAE.
        micro_batch: Images per step.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).
        device: ``"cpu"``, ``"cuda"``, or ``"meta"`` to count only.
        seed: Of weights, images and masks.
        steps: Training steps of a turn.
        mae_repo: Clone of the original code, if there is one.
    """

    model: str
    micro_batch: int
    precision: str
    device: str
    seed: int
    steps: int
    mae_repo: Path | None


class Loop:
    """A contender's model, optimizer and batch."""

    def __init__(self, contender: Contender, setup: Setup) -> None:
        torch.manual_seed(setup.seed)
        self.setup = setup
        sizes = sizes_of(setup.model)
        with torch.device(setup.device):
            side = sizes["image_size"]
            self.images = torch.randn(setup.micro_batch, 3, side, side)  # first: the same for all
            self.model, self._loss_of = BUILDERS[contender.code](contender, setup, sizes)
        self.model.to(setup.device).train()
        if contender.compiled:
            self.model.compile()
        fused = True if contender.fused else None  # None is the default: PyTorch chooses
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=fused, **ADAMW)

    def loss(self) -> Tensor:
        """Forward and loss in full precision."""
        return self._loss_of(self.images)

    def step(self) -> None:
        """One training step."""
        bf16 = self.setup.precision == "bf16"
        with torch.autocast(self.setup.device, dtype=torch.bfloat16, enabled=bf16):
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def turn(self) -> dict[str, float]:
        """Some steps, and the seconds of one; the GPU memory is free for the others afterwards."""
        on_gpu = self.setup.device == "cuda"
        if on_gpu:
            self.step()  # gets the memory back
        synchronize(self.setup.device)
        start = time.perf_counter()
        for _ in range(self.setup.steps):
            self.step()
        synchronize(self.setup.device)
        seconds = time.perf_counter() - start
        if on_gpu:
            torch.cuda.empty_cache()
        return {"step": seconds / self.setup.steps}


def turns_of(contender: Contender, setup: Setup, lock: Path) -> Callable[[], dict[str, float]]:
    """Build a contender and return its turns; one that ran out of GPU memory has no seconds.

    A turn waits for the lock, so that warming up, too, takes the memory of only one contender at a time.
    """
    loop = Loop(contender, setup)
    alone = FileLock(lock)  # free again when its process dies

    def turn() -> dict[str, float]:
        with alone:
            try:
                return loop.turn()
            except torch.OutOfMemoryError as error:
                print(f"{contender}: {error}", file=sys.stderr)
            loop.optimizer.zero_grad()
            torch.cuda.empty_cache()  # not inside of except: the error holds the tensors
            return {}

    return turn


def sizes_of(model: str) -> dict[str, Any]:
    """The arguments of our `MAE` for a name."""
    parameters = inspect.signature(MODELS[model]).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def trained_parameters(model: nn.Module) -> int:
    """Numbers that the optimizer changes."""
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


def flops_per_image(model: str, codes: Sequence[str], mae_repo: Path | None) -> dict[str, float]:
    """FLOPs of each code's forward and backward, counted as they run, on the meta device."""
    setup = Setup(model, 2, "fp32", "meta", 0, 1, mae_repo)
    counted = {}
    for code in codes:
        loop = Loop(Contender(code), setup)
        counted[code] = flops_of(partial(_forward_and_backward, loop)) / setup.micro_batch
    return counted


def _forward_and_backward(loop: Loop) -> None:
    loop.loss().backward()


Built = tuple[nn.Module, Callable[[Tensor], Tensor]]


def _ours(contender: Contender, setup: Setup, sizes: dict[str, Any]) -> Built:
    model: Any = MODELS[setup.model]()
    labels = torch.zeros(setup.micro_batch, dtype=torch.int64)

    def loss(images: Tensor) -> Tensor:
        batch = (images, labels)
        return model.loss(model(batch), batch)

    return model, loss


def _huggingface(contender: Contender, setup: Setup, sizes: dict[str, Any]) -> Built:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        hidden_size=sizes["embed_dim"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["num_heads"],
        intermediate_size=4 * sizes["embed_dim"],
        decoder_hidden_size=sizes["decoder_dim"],
        decoder_num_hidden_layers=sizes["decoder_depth"],
        decoder_num_attention_heads=sizes["decoder_heads"],
        decoder_intermediate_size=4 * sizes["decoder_dim"],
        mask_ratio=sizes["mask_ratio"],
        norm_pix_loss=sizes["norm_pixel_target"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=contender.attention,
    )
    model: Any = ViTMAEForPreTraining(config)
    return model, lambda images: model(images).loss


def _original(contender: Contender, setup: Setup, sizes: dict[str, Any]) -> Built:
    assert setup.mae_repo is not None
    model = build_original(setup.mae_repo, sizes)
    ratio = sizes["mask_ratio"]
    return model, lambda images: model(images, mask_ratio=ratio)[0]


BUILDERS: dict[str, Callable[[Contender, Setup, dict[str, Any]], Built]] = {
    "ours": _ours,
    "huggingface": _huggingface,
    "original": _original,
}
