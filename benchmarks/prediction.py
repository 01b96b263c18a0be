"""What a step, its data and its checkpoints cost on many GPUs: formulas; nothing here is measured.

The global batch B is fixed, as in the recipes, so that a run is the same run on any number of GPUs, N.

- images of a GPU and step: b = B/N, in M = ceil(b / micro-batch) micro-batches
- compute, s: b · FLOPs of an image (counted, `recipes/estimate.py`) / (peak rate · utilisation)
- communication, s, of the collectives of `communication.py`, with P the bytes of their full tensors, c their
  calls and g the processes: (g-1)/g · P / rate + c · hops · latency for gathers and reduce-scatters (rings);
  2 (g-1)/g · P / rate + c · 2 (1 + log2 nodes) · latency for all-reduces (trees). Inside of a node the rate
  is that of a GPU's link, and there is one hop; among whole nodes it is what all network cards of a node
  carry together, and a hop for each node. HSDP shards within nodes; its all-reduces, one between the first
  GPUs of all nodes, one between the second ones and so on, share the cards.
- a step takes at least the longer of both, if they overlap entirely, and at most their sum, if not at all
- data of a node, bytes/s: images/s of the node · bytes of an image in the shards
- checkpoint, bytes: 12 of each trained parameter (weight and AdamW's two moments, float32), 4 of a fixed one
- state of a GPU, bytes: 16 of each trained parameter (the gradient, too), 4 of a fixed one; divided by the
  processes that share it. DDP's buckets hold the gradients once more, as Composer asks for no views of them
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from communication import Collective, Traffic, Unit, ddp_traffic, fsdp2_traffic, units_of

from aemim_algorithm import AEMIM, apply_adapters
from aemim_algorithm.models import MAE
from aemim_algorithm.recipes.estimate import step_flops

__all__ = [
    "MODELS",
    "Job",
    "Machine",
    "Workload",
    "all_reduce_seconds",
    "named_workload",
    "predict",
    "ring_seconds",
    "workload",
]

# MAE's published sizes; its decoder is the same for all of them.
MODELS: dict[str, dict[str, Any]] = {
    "vit_base": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_huge": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
}
IMAGE_SIZE = 224


@dataclass(frozen=True)
class Machine:
    """A node of GPUs. The defaults are those of a DGX H100, except for what is marked as assumed.

    Attributes:
        gpus: GPUs of a node.
        flops: FLOP/s of a GPU, bfloat16, dense (NVIDIA H100 SXM data sheet: 989.4e12).
        utilization: Share of it that training reaches. Assumed; measure your own.
        link: Bytes/s of a GPU inside of the node, each way (NVLink 4: 900e9 both ways, same data sheet).
        network: Bytes/s of a node, each way (DGX H100 data sheet: 8 cards of 400 Gbit/s).
        latency: Seconds of a hop. Assumed.
    """

    gpus: int = 8
    flops: float = 989.4e12
    utilization: float = 0.4
    link: float = 450e9
    network: float = 400e9
    latency: float = 5e-6


@dataclass(frozen=True)
class Workload:
    """What one model costs under T attack steps, on the meta device.

    Attributes:
        flops: Of an image.
        units: FSDP units.
        trained: Trained parameters, copies included.
        fixed: Other parameters.
    """

    flops: float
    units: list[Unit]
    trained: int
    fixed: int

    @property
    def checkpoint_bytes(self) -> int:
        """Of the tensors of a whole checkpoint."""
        return 12 * self.trained + 4 * self.fixed

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and moments."""
        return 16 * self.trained + 4 * self.fixed


@dataclass(frozen=True)
class Job:
    """A run: model, strategy and number of GPUs."""

    strategy: str
    gpus: int
    steps: int
    batch: int
    micro_batch: int
    image_bytes: float

    @property
    def images(self) -> float:
        """Of a GPU in one step."""
        return self.batch / self.gpus

    @property
    def micro_batches(self) -> int:
        """Of a GPU in one step."""
        return math.ceil(self.images / self.micro_batch)


def workload(build: Callable[[], MAE], steps: int) -> Workload:
    """Count a model without allocating it.

    Args:
        build: Builds the model.
        steps: Attack steps T; 0: a run without AEMIM.

    Returns:
        The counts.
    """
    with torch.device("meta"):
        model = build()
    height, width = model.encoder.patch_embed.img_size
    batch = (torch.empty(2, 3, height, width, device="meta"), torch.empty(2, device="meta"))
    flops = step_flops(model, batch, AEMIM(steps=steps) if steps else None) / 2
    if steps:
        apply_adapters(model)
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    return Workload(flops, units_of(model), trained=sizes[True], fixed=sizes[False])


@cache
def named_workload(name: str, steps: int) -> Workload:
    """The workload of one of the published sizes."""
    return workload(lambda: MAE(image_size=IMAGE_SIZE, **MODELS[name]), steps)


def traffic_of(load: Workload, job: Job, machine: Machine) -> Traffic:
    """The collectives of a step; none on one GPU."""
    if job.gpus == 1:
        return Traffic()
    if job.strategy == "ddp":
        return ddp_traffic(load.units, processes=job.gpus)
    replicas = max(1, job.gpus // machine.gpus) if job.strategy == "hsdp" else 1
    return fsdp2_traffic(
        load.units,
        processes=job.gpus,
        replicas=replicas,
        steps=job.steps,
        micro_batches=job.micro_batches,
    )


def ring_seconds(collective: Collective, machine: Machine) -> float:
    """Of gathers or reduce-scatters among the GPUs of one node or of whole nodes."""
    group = collective.group
    inside = group <= machine.gpus
    rate = machine.link if inside else min(machine.link, machine.network)
    hops = 1 if inside else group // machine.gpus
    return (group - 1) / group * collective.payload / rate + collective.calls * hops * machine.latency


def all_reduce_seconds(collective: Collective, machine: Machine, *, between_nodes: bool) -> float:
    """Of all-reduces.

    Args:
        collective: The calls and bytes.
        machine: The hardware.
        between_nodes: Whether the processes are one GPU of each node, and so are those of the other GPUs at
            the same time; else they are all GPUs of one node or of whole nodes.
    """
    group = collective.group
    nodes = group if between_nodes else max(1, group // machine.gpus)
    rate = machine.link if nodes == 1 else min(machine.link, machine.network)
    rate = machine.network / machine.gpus if between_nodes else rate
    hops = 2 * (1 + math.log2(nodes))
    return 2 * (group - 1) / group * collective.payload / rate + collective.calls * hops * machine.latency


def predict(load: Workload, job: Job, machine: Machine) -> dict[str, Any]:
    """What the formulas above say of a job.

    Returns:
        Values in seconds, bytes, images per second and numbers.
    """
    traffic = traffic_of(load, job, machine)
    compute = job.images * load.flops / (machine.flops * machine.utilization)
    communication = sum(ring_seconds(ring, machine) for ring in (traffic.all_gather, traffic.reduce_scatter))
    communication += all_reduce_seconds(traffic.all_reduce, machine, between_nodes=job.strategy == "hsdp")
    overlapped, serial = max(compute, communication), compute + communication
    shards = 1 if job.strategy == "ddp" else traffic.all_gather.group
    images_of_node = min(machine.gpus, job.gpus) * job.images
    return {
        "strategy": job.strategy,
        "gpus": job.gpus,
        "images": job.images,
        "micro_batches": job.micro_batches,
        "compute": compute,
        "traffic": asdict(traffic),
        "communication": communication,
        "step": [overlapped, serial],
        "images_per_second": [job.batch / serial, job.batch / overlapped],
        "node_data": images_of_node * job.image_bytes / overlapped,
        "state": load.state_bytes / shards
        + (4 * load.trained if job.strategy == "ddp" and job.gpus > 1 else 0),
        "checkpoint": load.checkpoint_bytes,
    }
