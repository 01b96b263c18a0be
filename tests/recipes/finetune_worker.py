"""Two processes fine-tune, and note the accuracy that each of them has: see test_finetune.py.

``python finetune_worker.py RECIPE FOLDER [KEY=VALUE ...]``: writes ``accuracy-<rank>.json`` into the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ranks import join_world, run_ranks

from aemim_algorithm.recipes.finetune import finetune
from aemim_algorithm.recipes.schema import load_finetuning


def run(rank: int, path: Path, folder: Path, overrides: list[str]) -> None:
    """One process."""
    join_world()
    accuracy = finetune(load_finetuning(path, overrides)).accuracy
    (folder / f"accuracy-{rank}.json").write_text(json.dumps([accuracy.correct, accuracy.n]))


if __name__ == "__main__":
    given = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    if any(run_ranks(2, lambda rank: run(rank, *given))):
        sys.exit(1)
