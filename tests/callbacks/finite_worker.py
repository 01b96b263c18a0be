"""One process of two, of which one meets a NaN: see test_finite_check.py.

``python finite_worker.py FOLDER`` writes a line for each case to ``FOLDER/<rank>.txt``.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.utils import FSDP2Config, dist, get_device

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import normalised_images, tiny_mae
from ranks import run_ranks

from aemim_algorithm import AEMIM
from aemim_algorithm.callbacks import FiniteCheck


def batches(*, poisoned: bool) -> list[Any]:
    """Four images for each process and batch; the second process has a NaN in its second batch."""
    images = normalised_images(24).reshape(3, 2, 4, 3, 16, 16)
    if poisoned:
        images[1, 1, 1] = float("nan")  # sample 5 of the global batch
    return [(rows[dist.get_global_rank()], torch.arange(4)) for rows in images]


def outcome(kind: str, poisoned: str) -> str:
    """How a run ends."""
    model = tiny_mae()
    if poisoned == "gradient" and dist.get_global_rank() == 1:
        calls = [0]

        def poison(module: Any, inputs: Any, gradients: Any) -> Any:
            calls[0] += 1
            bad = calls[0] > 3  # clean, attack and adversarial in the first batch
            return (gradients[0] * float("nan"),) if bad else None

        model.encoder.norm.register_full_backward_hook(poison)
    check = FiniteCheck(on_nonfinite="skip" if poisoned == "skip" else "stop")
    trainer = Trainer(
        model=model,
        train_dataloader=batches(poisoned=poisoned != "gradient"),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        algorithms=[AEMIM(steps=1)],
        callbacks=[check],
        max_duration="3ba",
        device_train_microbatch_size=4,
        device="cpu",
        seed=7,
        parallelism_config={"fsdp": FSDP2Config()} if kind == "fsdp2" else None,
        progress_bar=False,
    )
    try:
        trainer.fit()
    except FloatingPointError as error:
        return str(error)
    finally:
        trainer.close()
    finite = all(bool(parameter.isfinite().all()) for parameter in trainer.state.model.parameters())
    return f"{check.state_dict()['skipped']} skipped, {'finite' if finite else 'broken'}"


def run(folder: Path) -> None:
    """Every case, in one of the two processes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.initialize_dist(get_device("cpu"), timeout=30)
    with (folder / f"{dist.get_global_rank()}.txt").open("w") as lines:
        for kind in ("ddp", "fsdp2"):
            for poisoned in ("image", "gradient", "skip"):
                print(kind, poisoned, outcome(kind, poisoned), file=lines, flush=True)


if __name__ == "__main__":
    sys.exit(any(run_ranks(2, lambda rank: run(Path(sys.argv[1])))))
