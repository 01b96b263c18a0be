"""One process of a run whose parameters must not depend on how many there are: see test_parity.py.

``python parity_worker.py FOLDER``: trains every case, and the first process writes the full parameters after three
optimizer steps to ``<kind>-<number of the case>.pt``.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.models import ComposerModel
from composer.utils import FSDP2Config, dist, get_device
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import perturb
from settings import BATCH_SIZE, SETTINGS, Setting, with_mask_of_batch, without_randomness

from aemim_algorithm import AEMIM, apply_adapters
from aemim_algorithm.samples import take_samples

STEPS = 3


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        model: Name of a model in the table whose batches hold the masks: random ones would be others on
            each process.
        steps: Attack steps T.
        ratio: Share α.
        micro_batches: Of each process.
    """

    model: str
    steps: int
    ratio: float
    micro_batches: int


CASES = [
    Case(model, steps, ratio, micro_batches)
    for model in ("`MAE`", "`SimMIM` on a Swin Transformer", "Hugging Face `SwinForMaskedImageModeling`")
    for steps, ratio, micro_batches in ((1, 1.0, 1), (2, 0.25, 2), (2, 1.0, 2))
]


def setting_of(case: Case) -> Setting:
    """The case's row of the table."""
    (setting,) = (setting for setting in SETTINGS if setting.name == case.model)
    return setting


def own_rows(batch: Any) -> Any:
    """This process's samples of a global batch."""
    size = BATCH_SIZE // dist.get_world_size()
    index = torch.arange(size) + dist.get_global_rank() * size
    return take_samples(batch, index, BATCH_SIZE)


def untrained(case: Case) -> ComposerModel:
    """The model that every process starts from; its copies differ from the clean parameters."""
    model = with_mask_of_batch(without_randomness(setting_of(case).build()))
    apply_adapters(model)
    perturb(model)
    return model


def run(case: Case, kind: str) -> dict[str, Tensor]:
    """Train, and gather the full parameters."""
    setting, model = setting_of(case), untrained(case)
    trainer = Trainer(
        model=model,
        train_dataloader=[own_rows(setting.batch(number)) for number in range(STEPS)],
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        algorithms=[AEMIM(steps=case.steps, adversarial_ratio=case.ratio)],
        max_duration=f"{STEPS}ba",
        device="cpu",
        seed=7,
        device_train_microbatch_size=BATCH_SIZE // dist.get_world_size() // case.micro_batches,
        parallelism_config={"fsdp": FSDP2Config()} if kind == "fsdp2" else None,
        progress_bar=False,
    )
    trainer.fit()
    sharded = [isinstance(parameter, DTensor) for parameter in trainer.state.model.parameters()]
    assert all(sharded) if kind == "fsdp2" else not any(sharded)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(trainer.state.model, options=options)
    trainer.close()
    return {name.removeprefix("module."): value for name, value in state.items()}


def average_with_gloo() -> None:
    """gloo sums where FSDP2 asks it to average (pytorch#162338)."""
    reduce_scatter = torch.distributed.reduce_scatter_tensor

    def averaging(output: Tensor, input: Tensor, op: Any = None, **options: Any) -> Any:
        if op != torch.distributed.ReduceOp.AVG:
            return reduce_scatter(output=output, input=input, op=op, **options)
        done = reduce_scatter(output=output, input=input, op=torch.distributed.ReduceOp.SUM, **options)
        output.div_(dist.get_world_size())
        return done

    torch.distributed.reduce_scatter_tensor = averaging


def main(folder: Path) -> None:
    """Run every case of every kind that this number of processes has."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    average_with_gloo()
    dist.initialize_dist(get_device("cpu"), timeout=60)
    for kind in ("one",) if dist.get_world_size() == 1 else ("ddp", "fsdp2"):
        for number, case in enumerate(CASES):
            try:
                state = run(case, kind)
            except Exception:
                (folder / "error.txt").write_text(f"{kind}, {case}\n{traceback.format_exc()}")
                raise
            if dist.get_global_rank() == 0:
                torch.save(state, folder / f"{kind}-{number}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
