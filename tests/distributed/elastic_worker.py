"""One process of a run that is saved by two and goes on with one, two or four: see test_elastic.py.

``python elastic_worker.py FOLDER`` forks them all. What a run was at its checkpoint, when it has been loaded again
and at its end, and the samples that it saw, go to ``FOLDER/<kind>-<what>.pt``, written by the first process.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import FSDP2Config, dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import perturb, tiny_mae
from ranks import average_with_gloo, join_world, run_ranks

from aemim_algorithm import AEMIM, apply_adapters
from aemim_algorithm.callbacks import AtomicCheckpoints
from aemim_algorithm.callbacks.restored_randomness import RestoredRandomness
from aemim_algorithm.data.streaming import train_data

GLOBAL_BATCH, SAVED_AT, END = 8, 3, 7  # batches; an epoch has five
KINDS = ("ddp", "fsdp2-full", "fsdp2-sharded")


@dataclass(eq=False)
class Record(Callback):
    """The samples of each global batch, in order, and the whole state when a batch ends."""

    batches: list[Any]
    at: int
    state: dict[str, Tensor] | None = None

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Gather what each process got."""
        own = {name: state.batch[name].clone() for name in ("image", "label", "seed")}
        self.batches.append(dist.all_gather_object(own))

    def batch_end(self, state: State, logger: Logger) -> None:
        """Gather the whole state."""
        if state.timestamp.batch == self.at:
            self.state = whole_state(state)


def whole_state(state: State) -> dict[str, Tensor]:
    """Parameters, buffers and the optimizer's state by name, gathered on the first process."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model = get_model_state_dict(state.model, options=options)
    optimizer = get_optimizer_state_dict(state.model, state.optimizers[0], options=options)  # empty elsewhere
    moments = {
        f"{name}: {key}": value
        for name, values in optimizer.get("state", {}).items()
        for key, value in values.items()
    }
    return {name.removeprefix("module."): torch.as_tensor(v).clone() for name, v in (model | moments).items()}


def trainer_of(
    folder: Path, kind: str, record: Record, *, seed: int, aemim: bool = True, **arguments: Any
) -> Trainer:
    """A Trainer on the shards; its adversarial copies differ from the clean parameters."""
    model = tiny_mae(seed=seed)
    if aemim:
        apply_adapters(model)
        perturb(model)
    config = FSDP2Config(state_dict_type="sharded" if kind == "fsdp2-sharded" else "full")
    # One process reads the file of FSDP without it; folders of shards are for FSDP only.
    without = kind == "ddp" or (kind == "fsdp2-full" and dist.get_world_size() == 1)
    data = train_data(
        folder / "shards",
        image_size=16,
        batch_size=GLOBAL_BATCH // dist.get_world_size(),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        seed=7,
    )
    randomness = RestoredRandomness()
    trainer = Trainer(
        model=model,
        train_dataloader=data,
        # Where gradients vanish, AdamW with a small eps would turn their rounding into whole steps.
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3),
        algorithms=[AEMIM(mean=(0.5,) * 3, std=(0.25,) * 3)] if aemim else [],
        callbacks=[record, randomness, *arguments.pop("callbacks", [])],
        max_duration=f"{END}ba",
        device="cpu",
        seed=7,
        parallelism_config=None if without else {"fsdp": config},
        progress_bar=False,
        **arguments,
    )
    randomness.take_over(trainer)
    return trainer


def look_late() -> None:
    """Let the second rank look for its file when the first one could have taken it away."""
    exists = os.path.exists

    def late(path: Any) -> bool:
        if dist.get_global_rank() == 1 and str(path).endswith(".distcp"):
            time.sleep(0.5)
        return exists(path)

    os.path.exists = late  # type: ignore[assignment]


def save(folder: Path, kind: str) -> None:
    """The whole run, which saves on its way."""
    look_late()
    record = Record([], SAVED_AT)
    saver = AtomicCheckpoints(str(folder / kind), interval=f"{SAVED_AT}ba")
    trainer = trainer_of(folder, kind, record, seed=0, callbacks=[saver])
    trainer.fit()
    write(folder, f"{kind}-whole", record, trainer, loaded=None)


def resume(folder: Path, kind: str, *, aemim: bool = True) -> None:
    """Go on from the checkpoint, in a model that starts otherwise."""
    record = Record([], -1)
    name = f"ep0-ba{SAVED_AT}" if kind == "fsdp2-sharded" else f"ep0-ba{SAVED_AT}-rank0.pt"
    trainer = trainer_of(folder, kind, record, seed=9, aemim=aemim, load_path=str(folder / kind / name))
    loaded = whole_state(trainer.state)
    trainer.fit()
    suffix = "" if aemim else "-without"
    write(folder, f"{kind}-{dist.get_world_size()}{suffix}", record, trainer, loaded=loaded)


def write(folder: Path, name: str, record: Record, trainer: Trainer, loaded: Any) -> None:
    """Write what is compared."""
    content = {
        "saved": record.state,
        "loaded": loaded,
        "end": whole_state(trainer.state),
        "batches": record.batches,
        "timestamp": int(trainer.state.timestamp.sample),
    }
    trainer.close()
    if dist.get_global_rank() == 0:
        torch.save(content, folder / f"{name}.pt")


def run(folder: Path, action: str) -> None:
    """Every kind, in one process of those that belong together."""
    warnings.simplefilter("ignore")
    average_with_gloo()
    join_world()
    for kind in KINDS:
        if action == "save":
            save(folder, kind)
        resume(folder, kind)
    if action == "save":
        resume(folder, "ddp", aemim=False)
        try:
            resume(folder, "fsdp2-full", aemim=False)
        except ValueError as error:
            (folder / f"refused{dist.get_global_rank()}.txt").write_text(str(error.__cause__))


def main(folder: Path) -> None:
    """All processes, those that save first."""
    for processes, action in ((2, "save"), (1, "resume"), (4, "resume")):
        if any(run_ranks(processes, lambda rank, action=action: run(folder, action))):
            sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
