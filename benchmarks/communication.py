"""What one training step sends between processes, counted from the model's own FSDP units and parameters.

Symbols: N processes; a unit is a module that FSDP gathers as a whole (a block; what is left of encoder and
decoder). T attack steps; M micro-batches. For a unit, A is what a gather of it moves, G what a reduction
moves.

FSDP2 splits each parameter in its first dimension, n, over the S processes of a shard group, and fills up
to the same number of rows on each: S·ceil(n/S) rows. So a parameter whose first dimension is 1, such as a
position embedding, is sent S-fold. A counts all parameters of a unit, at the width of the forward; G those
that receive a gradient, in float32.

- Gathers of a block in one micro-batch, each of A: 2 without AEMIM (forward, backward). With it 4 in the
  decoder (two forwards, two backwards) and 4 + 2T in the encoder, as each attack step runs it once in both
  directions.
- What is left of encoder and decoder is the outermost unit of its part, which stays gathered until a
  backward has passed it: 1 without AEMIM; with it 2 in the decoder and 1 + T in the encoder.
- Reductions, each gradient once: G of a micro-batch does not depend on T, since an attack step gives no
  parameter a gradient, and both branches meet in one backward. The copies are ready when the adversarial
  branch is through, so they are a call of their own, except in the encoder's outermost unit, which reduces
  at the end.
- Hybrid (HSDP): as FSDP2 among S processes; then each of them all-reduces its S-th part, G/S, with its
  likes in the other groups.
- DDP: one all-reduce of all gradients a step, whatever T and M: there is one backward to the weights.

``tests/test_scaling_benchmark.py`` counts the calls and bytes of real processes; they are equal to these.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from composer.distributed.fsdp2_utils import generate_composer_model_policy
from composer.models import ComposerModel

from aemim_algorithm.adapters import adversarial_parameters

__all__ = ["STRATEGIES", "Collective", "Traffic", "Unit", "ddp_traffic", "fsdp2_traffic", "units_of"]

STRATEGIES = ("ddp", "fsdp2", "hsdp")
_GRADIENT_BYTES = 4  # float32, Composer's default under every precision


@dataclass(frozen=True)
class Parameter:
    """What of a parameter decides what is sent; ``copy``: it is an adversarial one."""

    shape: tuple[int, ...]
    trained: bool
    copy: bool

    def numel(self, shards: int = 1) -> int:
        """Elements, with the rows that fill up the last of the shards."""
        rows, *rest = self.shape or (1,)
        return math.ceil(rows / shards) * shards * math.prod(rest)


@dataclass(frozen=True)
class Unit:
    """What FSDP gathers as a whole."""

    name: str
    in_encoder: bool
    outermost: bool
    parameters: tuple[Parameter, ...]

    def elements(self, shards: int, *, trained: bool = False) -> int:
        """Of one gather, or of the gradients."""
        return sum(p.numel(shards) for p in self.parameters if p.trained or not trained)

    def gathers(self, steps: int) -> int:
        """How often it is gathered in one micro-batch."""
        if not steps:
            return 1 if self.outermost else 2
        if self.in_encoder:
            return 1 + steps if self.outermost else 4 + 2 * steps
        return 2 if self.outermost else 4

    def reductions(self) -> int:
        """How many calls reduce its gradients in one micro-batch."""
        trained = {parameter.copy for parameter in self.parameters if parameter.trained}
        return min(1, len(trained)) if self.in_encoder and self.outermost else len(trained)


@dataclass(frozen=True)
class Collective:
    """Calls of one kind in a step, the bytes of their full tensors, and the processes that take part."""

    calls: int = 0
    payload: int = 0
    group: int = 1


@dataclass(frozen=True)
class Traffic:
    """What each process takes part in during one step."""

    all_gather: Collective = Collective()
    reduce_scatter: Collective = Collective()
    all_reduce: Collective = Collective()


def units_of(model: ComposerModel, *, encoder: str = "encoder") -> list[Unit]:
    """The units that Composer makes of a model, in the order of its modules.

    Args:
        model: The model as it trains, with AEMIM's copies if there are any; on any device.
        encoder: Dotted path of the encoder.

    Returns:
        The units that have parameters.
    """
    chosen = generate_composer_model_policy(model)._lambda_fn
    names = {name for name, module in model.named_modules() if name and chosen(module)}
    copies = {id(copy) for copy in adversarial_parameters(model)}
    owned: dict[str, list[Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        above = [".".join(name.split(".")[:depth]) for depth in range(name.count(".") + 1)]
        owner = next((module for module in reversed(above) if module in names), "")
        trained, copy = parameter.requires_grad, id(parameter) in copies
        owned[owner].append(Parameter(tuple(parameter.shape), trained, copy))
    return [
        Unit(
            name,
            in_encoder=f"{name}.".startswith(f"{encoder}."),
            outermost=not any(name.startswith(f"{other}.") for other in names),
            parameters=tuple(owned[name]),
        )
        for name, _ in model.named_modules()
        if name in owned
    ]


def fsdp2_traffic(
    units: Iterable[Unit],
    *,
    processes: int,
    replicas: int = 1,
    steps: int = 0,
    micro_batches: int = 1,
    forward_bytes: int = 2,
) -> Traffic:
    """The collectives of a step under FSDP2, or HSDP if there are several replicas.

    Args:
        units: Of the model, with AEMIM's copies if ``steps`` is above 0.
        processes: All of them, N.
        replicas: Groups that each hold the whole model; N / replicas processes share one.
        steps: Attack steps T; 0: a run without AEMIM.
        micro_batches: Of a process in one step, M.
        forward_bytes: Of an element in the forward: 2 under bf16, 4 in float32.

    Returns:
        The traffic.
    """
    units = list(units)
    shards = processes // replicas
    calls = micro_batches * sum(unit.gathers(steps) for unit in units)
    gathered = micro_batches * sum(unit.gathers(steps) * unit.elements(shards) for unit in units)
    reductions = micro_batches * sum(unit.reductions() for unit in units)
    reduced = micro_batches * sum(unit.elements(shards, trained=True) for unit in units) * _GRADIENT_BYTES
    return Traffic(
        all_gather=Collective(calls, gathered * forward_bytes, shards),
        reduce_scatter=Collective(reductions, reduced, shards),
        all_reduce=Collective(reductions, reduced // shards, replicas) if replicas > 1 else Collective(),
    )


def ddp_traffic(units: Iterable[Unit], *, processes: int, bucket_bytes: int = 25 * 2**20) -> Traffic:
    """The collectives of a step under DDP: all gradients once, in buckets.

    Args:
        units: Of the model, with AEMIM's copies if there are any.
        processes: All of them, N.
        bucket_bytes: Size of a bucket; the number of calls is an estimate from it, the bytes are exact.

    Returns:
        The traffic.
    """
    payload = _GRADIENT_BYTES * sum(unit.elements(1, trained=True) for unit in units)
    return Traffic(all_reduce=Collective(math.ceil(payload / bucket_bytes), payload, processes))
