"""What a step costs, counted on the meta device: no weights are allocated, nothing is computed.

FLOPs and the tensors that autograd keeps are exact counts of the model's own forward and backward;
memory and time are estimates built on them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from aemim_algorithm.adapters import apply_adapters
from aemim_algorithm.algorithm import AEMIM
from aemim_algorithm.early_exit import EarlyExit
from aemim_algorithm.losses import total_loss
from aemim_algorithm.models.classifier import ImageClassifier
from aemim_algorithm.samples import first_tensor
from aemim_algorithm.search import find_encoder, resolve_encoder

__all__ = ["Estimate", "attack_flops", "estimate", "matmul_rate", "saved_bytes", "step_flops"]


@dataclass(frozen=True)
class Estimate:
    """Expected cost of a model under an algorithm, on one device.

    Attributes:
        encoder: Parameters of the encoder, without adversarial copies.
        other: The other parameters: the decoder.
        adversarial: Parameters of the adversarial copies.
        flops: Of one image's share of a training step.
        flops_ratio: Of ``flops`` to those of the same step without AEMIM.
        state_bytes: Weights, gradients and AdamW's two moments, float32.
        activation_bytes: What autograd keeps per image of a micro-batch, float32.
    """

    encoder: int
    other: int
    adversarial: int
    flops: float
    flops_ratio: float
    state_bytes: int
    activation_bytes: int


def estimate(
    build: Callable[[], ComposerModel], *, image_size: int, algorithm: AEMIM | None = None
) -> Estimate:
    """Count what a training step costs per image.

    Args:
        build: Builds the model.
        image_size: Side of the images, in pixels.
        algorithm: The AEMIM that the run uses, if any.

    Returns:
        The counts.
    """
    with torch.device("meta"):
        model = build()
    model = model.to("meta")
    images = torch.empty(2, 3, image_size, image_size, device="meta")
    batch = (images, torch.empty(2, dtype=torch.int64, device="meta"))
    plain = step_flops(model, batch) / 2
    flops = step_flops(model, batch, algorithm) / 2
    kept = saved_bytes(model, batch) // 2
    stock = _count(model)
    encoder = _count(_encoder(model, algorithm))
    if algorithm is not None:
        apply_adapters(model, algorithm.adapter)
        if not algorithm.separate_backward:
            # The clean graph is still there while the adversarial pass builds its own.
            kept += int(algorithm.present("adversarial_ratio") * kept)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    fixed = sum(value.numel() for value in model.parameters() if not value.requires_grad)
    return Estimate(
        encoder=encoder,
        other=stock - encoder,
        adversarial=_count(model) - stock,
        flops=flops,
        flops_ratio=flops / plain,
        state_bytes=4 * (4 * trained + fixed),
        activation_bytes=kept,
    )


def step_flops(model: ComposerModel, batch: Any, algorithm: AEMIM | None = None) -> float:
    """FLOPs of one training step: a clean forward and backward, and what AEMIM adds to them.

    Each of AEMIM's attack steps is a forward of the encoder and a backward to the image only; then
    comes a second forward and backward of the whole. Both are for ``adversarial_ratio`` of the
    batch.

    Args:
        model: The model, on any device; on ``meta`` nothing is computed.
        batch: A batch on the same device.
        algorithm: The AEMIM of the run; ``None`` for the plain model.

    Returns:
        FLOPs of the whole batch, a multiply-add counted as two.
    """
    with FlopCounterMode(display=False) as counter, _gradients_dropped(model):
        total_loss(model.loss(model(batch), batch)).backward()
    clean = float(counter.get_total_flops())
    if algorithm is None:
        return clean
    encoder = None if algorithm.adversarial_loss == "reconstruction" else _encoder(model, algorithm)
    layer = None
    if algorithm.attack_layer is not None:
        layer = EarlyExit(model, algorithm.attack_layer, encoder)
    try:
        attack = algorithm.steps * attack_flops(model, batch, encoder, layer)
    finally:
        if layer is not None:
            layer.remove()
    return clean + algorithm.present("adversarial_ratio") * (attack + clean)


def attack_flops(
    model: ComposerModel, batch: Any, encoder: nn.Module | None, layer: EarlyExit | None = None
) -> float:
    """FLOPs of one attack step: a forward, and a backward to the image, not to the weights.

    Args:
        model: The model.
        batch: Images and labels, on the model's device.
        encoder: The submodule that is attacked; ``None``: the reconstruction loss of the whole model.
        layer: The layer of it where the pass ends; ``None`` for its end.

    Returns:
        FLOPs for the whole batch.
    """
    if encoder is None:
        images = batch[0].detach().requires_grad_().clone()
        with FlopCounterMode(display=False) as counter:
            loss = total_loss(model.loss(model((images, *batch[1:])), batch))
            torch.autograd.grad(loss, images)
        return float(counter.get_total_flops())
    module = encoder
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    hook = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with torch.no_grad():
            model(batch)
    finally:
        hook.remove()
    (images, *rest), options = calls[0]
    # Not a leaf: the counter's own hooks refuse autograd.grad to a leaf that enters a module.
    images = images.detach().requires_grad_().clone()
    with FlopCounterMode(display=False) as counter:
        encode = partial(module, images, *rest, **options)
        features = first_tensor(encode()) if layer is None else layer.output_of(encode)
        assert features is not None  # the clean pass has returned some
        torch.autograd.grad(features.sum(), images)
    return float(counter.get_total_flops())


def saved_bytes(model: ComposerModel, batch: Any) -> int:
    """Bytes that autograd keeps between forward and backward, weights excepted.

    Args:
        model: The model.
        batch: A batch on the model's device.

    Returns:
        Bytes for the whole batch; tensors that share storage count once.
    """
    weights = {value.untyped_storage()._cdata for value in model.parameters()}
    # The storages themselves are kept, so that none is freed and its address used again.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(model(batch), batch)
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def matmul_rate(
    device: torch.device, dtype: torch.dtype, *, seconds: float = 1.0, size: int | None = None
) -> float:
    """Measure how fast a device multiplies matrices.

    Args:
        device: The device.
        dtype: Of the matrices.
        seconds: How long to measure.
        size: Side of the square matrices; by default large enough to fill the device.

    Returns:
        FLOPs per second.
    """
    side = size or (4096 if device.type == "cuda" else 1024)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    left @ right
    _synchronize(device)
    products, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not products:
        left @ right
        _synchronize(device)
        products += 1
    return products * 2 * side**3 / elapsed


def _encoder(model: nn.Module, algorithm: AEMIM | None) -> nn.Module:
    """The encoder, or the module whose method it is."""
    if isinstance(model, ImageClassifier):
        return model.network
    path = (algorithm.encoder if algorithm is not None else None) or find_encoder(model)
    owner, _, encoder = resolve_encoder(model, path)
    return encoder if isinstance(encoder, nn.Module) else owner


def _count(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _gradients_dropped(model: nn.Module) -> Iterator[None]:
    """Leave every ``.grad`` as it was."""
    before = [value.grad for value in model.parameters()]
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        for value, gradient in zip(model.parameters(), before, strict=True):
            value.grad = gradient
