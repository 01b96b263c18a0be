"""A recipe at several numbers of processes, which note the losses that they logged: see test_processes.py.

``python processes_worker.py RECIPE FOLDER [KEY=VALUE ...]``: writes ``<processes>-<images of a forward>.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from composer.loggers import InMemoryLogger
from composer.utils import dist
from ranks import join_world, run_ranks

from aemim_algorithm.recipes.datasets import train_shards
from aemim_algorithm.recipes.preflight import prepare
from aemim_algorithm.recipes.pretrain import build_trainer
from aemim_algorithm.recipes.schema import load_recipe

# Processes, images of a forward pass, loader workers.
CASES = ((1, 2, 0), (2, 4, 2), (4, 1, 0))


def losses(path: Path, overrides: list[str]) -> dict[str, list[float]]:
    """Train as the recipe says; each batch's losses, as every process logs them."""
    recipe = load_recipe(path, ["loggers.in_memory_logger=null", *overrides])
    parts = prepare(recipe)
    trainer = build_trainer(recipe, parts, train_shards(recipe.data))
    trainer.fit()
    (logger,) = (each for each in parts.loggers if isinstance(each, InMemoryLogger))
    logged = {
        name.rpartition("/")[2]: [float(value) for _, value in values]
        for name, values in logger.data.items()
        if name.startswith("loss/train/")
    }
    trainer.close()
    return logged


def run(case: tuple[int, int, int], path: Path, folder: Path, overrides: list[str]) -> None:
    """One process of a case."""
    processes, micro, workers = case
    join_world()
    name = f"{processes}-{micro}"
    own = [f"save_folder={folder / name}", f"data.workers={workers}", f"device_train_microbatch_size={micro}"]
    found = losses(path, [*overrides, *own])
    if dist.get_global_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    given = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    for case in CASES:
        if any(run_ranks(case[0], lambda rank, case=case: run(case, *given))):
            sys.exit(1)
