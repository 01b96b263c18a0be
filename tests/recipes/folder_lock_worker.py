"""Two processes ask for a save folder, and note what they are told: see test_folder_lock.py.

``python folder_lock_worker.py SAVE_FOLDER FOLDER``: writes ``refusal-<rank>.txt`` into the second folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ranks import join_world, run_ranks

from aemim_algorithm.recipes.folder_lock import hold_save_folder


def run(rank: int, wanted: Path, folder: Path) -> None:
    """One process."""
    join_world()
    try:
        with hold_save_folder(wanted):
            refusal = ""
    except ValueError as error:
        refusal = str(error)
    (folder / f"refusal-{rank}.txt").write_text(refusal)


if __name__ == "__main__":
    if run_ranks(2, lambda rank: run(rank, Path(sys.argv[1]), Path(sys.argv[2])), together=False) != [0, 0]:
        sys.exit(1)
