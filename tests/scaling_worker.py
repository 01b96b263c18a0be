"""Processes that train for a moment and count what they send: see test_scaling_benchmark.py.

``python scaling_worker.py FOLDER``: imports once and forks, so that the cases of two and of four processes cost one
start. The first process of each writes ``<world size>.json``: for each case the calls and bytes of a training step.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import FSDP2Config, dist, get_device
from conftest import normalised_images, tiny_mae
from torch.nn.parallel import DistributedDataParallel

from aemim_algorithm import AEMIM
from aemim_algorithm.models import MAE
from aemim_algorithm.recipes.parallel import HybridFSDP2Config

# strategy, attack steps (0: without AEMIM), micro-batches, precision of the forward
Case = tuple[str, int, int, str]
CASES: dict[int, list[Case]] = {
    2: [("ddp", steps, 1, "fp32") for steps in (0, 1, 2)]
    + [("fsdp2", steps, 1, "fp32") for steps in (0, 1, 2)]
    + [("ddp", 2, 2, "fp32"), ("fsdp2", 2, 2, "fp32"), ("fsdp2", 1, 1, "bf16")],
    4: [("fsdp2", 1, 1, "fp32"), ("hsdp", 0, 1, "fp32"), ("hsdp", 2, 2, "fp32")],
}
PARALLELISM: dict[str, Any] = {
    "ddp": lambda _: None,
    # As on a GPU under amp_bf16, which Composer does not run on a CPU.
    "fsdp2": lambda forward: {
        "fsdp": FSDP2Config(mixed_precision={"param_dtype": forward, "reduce_dtype": "fp32"})  # type: ignore[arg-type]
    },
    "hsdp": lambda _: {"fsdp": HybridFSDP2Config(data_parallel_replicate_degree=2)},
}
BATCH = 4  # of each process


def model() -> MAE:
    """Its head has 75 outputs, which neither two nor four processes divide."""
    return tiny_mae(image_size=20, patch_size=5)


class Counting(Callback):
    """Counts collectives between the start and the end of the last batch."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.open = False

    def batch_start(self, state: State, logger: Logger) -> None:
        self.counts.clear()
        self.open = True

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self.open = False

    def add(self, kind: str, tensor: torch.Tensor) -> None:
        if self.open:
            self.counts[f"{kind} calls"] += 1
            self.counts[f"{kind} bytes"] += tensor.numel() * tensor.element_size()


COUNTING = Counting()


def count_fsdp() -> None:
    """FSDP2 calls these; gloo cannot average, and a CPU has no events for HSDP to wait for."""
    torch.cpu.Stream.record_event = lambda self: torch.cpu.Event()  # type: ignore[attr-defined]
    total = torch.distributed.ReduceOp.SUM
    gather, scatter, reduce = (
        getattr(torch.distributed, name)
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
    )

    def all_gather(output_tensor: Any, *args: Any, **options: Any) -> Any:
        COUNTING.add("all_gather", output_tensor)
        return gather(output_tensor, *args, **options)

    def reduce_scatter(output: Any, input: Any, **options: Any) -> Any:
        COUNTING.add("reduce_scatter", input)
        return scatter(output, input, **options | {"op": total})

    def all_reduce(tensor: Any, *args: Any, **options: Any) -> Any:
        if options.get("op") == torch.distributed.ReduceOp.AVG:  # FSDP's; others' are sums and maxima
            COUNTING.add("all_reduce", tensor)
            options["op"] = total
        return reduce(tensor, *args, **options)

    torch.distributed.all_gather_into_tensor = all_gather
    torch.distributed.reduce_scatter_tensor = reduce_scatter
    torch.distributed.all_reduce = all_reduce


def count_ddp(wrapped: DistributedDataParallel) -> None:
    def hook(_: None, bucket: Any) -> Any:
        COUNTING.add("all_reduce", bucket.buffer())
        work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    hook.__annotations__.clear()  # DDP compares them with classes, and here they are text
    wrapped.register_comm_hook(None, hook)


def run(case: Case) -> dict[str, int]:
    strategy, steps, micro_batches, precision = case
    network = model()
    trainer = Trainer(
        model=network,
        train_dataloader=[(normalised_images(BATCH, size=20), torch.zeros(BATCH))] * 2,
        optimizers=torch.optim.SGD(network.parameters(), lr=0.1),
        algorithms=[AEMIM(steps=steps)] if steps else [],
        callbacks=[COUNTING],
        max_duration="2ba",
        device="cpu",
        device_train_microbatch_size=BATCH // micro_batches,
        parallelism_config=PARALLELISM[strategy](precision),
        progress_bar=False,
    )
    if isinstance(trainer.state.model, DistributedDataParallel):
        count_ddp(trainer.state.model)
    trainer.fit()
    trainer.close()
    return dict(COUNTING.counts)


def process(folder: Path, rank: int, world: int, port: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    places |= {"NODE_RANK": 0, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
    count_fsdp()
    dist.initialize_dist(get_device("cpu"), timeout=60)
    counts = [run(case) for case in CASES[world]]
    if rank == 0:
        (folder / f"{world}.json").write_text(json.dumps(counts))


def forked(folder: Path, world: int) -> None:
    """Run the cases of one world size, each process a fork of this one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            code = 1
            try:
                process(folder, rank, world, port)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        raise SystemExit(f"a process of {world} failed")


if __name__ == "__main__":
    for world_size in CASES:
        forked(Path(sys.argv[1]), world_size)
