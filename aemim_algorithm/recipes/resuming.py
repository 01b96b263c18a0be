"""Where a run that is started again continues: at its newest checkpoint that is whole."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from aemim_algorithm.callbacks.checkpoint_files import (
    LATEST_NAME,
    checkpoints_in,
    damage,
    link,
    remove,
    remove_partial,
)
from aemim_algorithm.first_rank import on_first_rank

__all__ = ["has_checkpoint", "resume_point"]

_LATEST = LATEST_NAME.format(rank=0)


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has left a checkpoint, whole or not."""
    # A link without its checkpoint is a trace of one as well.
    return bool(checkpoints_in(folder)) or os.path.lexists(folder / _LATEST)


def resume_point(folder: Path) -> Path | None:
    """Find the checkpoint to continue from, and make ``latest-rank0.pt`` link to it.

    The first rank looks for all of them. What a killed process had not finished to write is removed; a
    checkpoint that is damaged is set aside under another name, with a warning.

    Args:
        folder: The run's save folder, the same for all ranks.

    Returns:
        The checkpoint; ``None`` if the run has none yet.

    Raises:
        ValueError: If there are checkpoints, and none of them is whole or they cannot be read; on every
            rank.
    """
    return on_first_rank(lambda: _find(folder))


def _find(folder: Path) -> Path | None:
    try:
        return _whole(folder)
    except OSError as reason:
        raise ValueError(f"save_folder={folder}: the checkpoints cannot be looked at ({reason})") from reason


def _whole(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; none if there are none at all."""
    for place in (folder, folder / "pictures"):
        remove_partial(place)
    damaged: dict[Path, str] = {}
    for checkpoint in checkpoints_in(folder):
        reason = damage(checkpoint)
        if reason is None:
            link(checkpoint, _LATEST)
            _set_aside(damaged, checkpoint)
            return checkpoint
        damaged[checkpoint] = reason
    if not damaged and not os.path.lexists(folder / _LATEST):
        return None
    reasons = [f"{path.name}: {reason}" for path, reason in damaged.items()] or [
        f"{_LATEST} links to nothing"
    ]
    raise ValueError(
        f"save_folder={folder}: none of its {len(damaged)} checkpoints can be read ({reasons[0]}); put one "
        "back, or start afresh under another run_name"
    )


def _set_aside(damaged: dict[Path, str], continued: Path) -> None:
    for path, reason in damaged.items():
        aside = path.with_name(f"damaged-{path.name}")
        if aside.exists():
            remove(aside)  # of the last time that it was damaged
        path.replace(aside)
        warnings.warn(
            f"the checkpoint {path.name} is damaged ({reason}) and is now called {aside.name}; the run "
            f"continues from {continued.name}",
            stacklevel=2,
        )
