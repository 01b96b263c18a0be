"""Two processes of a recipe, of which one fails: see test_failing_rank.py.

``python failing_worker.py RECIPE CASE`` under Composer's launcher: one rank fails as the case says, in its
third batch or at its first checkpoint. ``python failing_worker.py RECIPE``: every case in turn, without a launcher that would end the other rank;
a line of JSON for each rank tells how it ended.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from ranks import run_ranks

from aemim_algorithm import cli
from aemim_algorithm.callbacks import atomic_checkpoints
from aemim_algorithm.models import MAE
from aemim_algorithm.recipes import pretrain  # also so that forks need not import it

LIMIT = 60.0  # seconds that a rank may take to end
TIMEOUT = 10  # seconds that a rank waits for the other, where that is what ends the run, or must not
# Which rank it happens to; the first one writes checkpoints and the encoder.
FAILING = {"loss": 1, "loader": 1, "memory": 1, "disk": 0, "slow end": 0}


def at_third_call(owner: Any, name: str, fail: Callable[[], None]) -> None:
    original, calls = getattr(owner, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            fail()
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def in_loss() -> None:
    raise RuntimeError("the loss of rank 1 is at fault")


def in_loader() -> None:
    raise ValueError("the loader of rank 1 is at fault")


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def slowly(*_: Any, **__: Any) -> Any:
    time.sleep(2 * TIMEOUT)
    return {}


def arm(case: str) -> None:
    """Patch what fails, or takes its time, in this process."""
    from aemim_algorithm.data.streaming import _TrainingLoader

    if case == "disk":
        atomic_checkpoints.publish = full
    elif case == "slow end":
        pretrain.export_encoder = slowly
    elif case == "loader":
        original = _TrainingLoader.__iter__

        def broken(self: Any) -> Any:
            for number, batch in enumerate(original(self)):
                if number == 2:
                    in_loader()
                yield batch

        _TrainingLoader.__iter__ = broken
    else:
        at_third_call(MAE, "loss", {"loss": in_loss, "memory": out_of_memory}[case])


def rank(recipe: str, case: str) -> None:
    """One process."""
    torch.set_num_threads(1)
    if int(os.environ["RANK"]) == FAILING[case]:
        arm(case)
    sys.argv = ["aemim", "pretrain", recipe, f"save_folder={case}"]
    if FAILING[case] == 0:
        sys.argv.append(f"dist_timeout={TIMEOUT}")
    cli.main()


def logged(recipe: str, case: str, number: int) -> None:
    log = os.open(f"{case}-{number}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    rank(recipe, case)


def outcomes(recipe: str, case: str) -> list[dict[str, Any]]:
    """How both ranks end, nobody ending one for the other's sake; one that hangs has no code."""
    codes = run_ranks(2, lambda number: logged(recipe, case, number), limit=LIMIT, together=False)
    return [
        {"case": case, "rank": number, "code": code, "said": Path(f"{case}-{number}.txt").read_text()}
        for number, code in enumerate(codes)
    ]


if __name__ == "__main__":
    if len(sys.argv) == 3:
        rank(*sys.argv[1:])
    else:
        for each in FAILING:
            for outcome in outcomes(sys.argv[1], each):
                print(json.dumps(outcome))
