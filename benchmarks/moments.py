"""Moments inside of a run at which ``faults.py`` kills it, by patches that only the killed process has.

Each function of ``MOMENTS`` patches what it names, so that the process group dies with ``SIGKILL`` in the
midst of it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from streaming import MDSWriter

from aemim_algorithm import branch
from aemim_algorithm.callbacks import atomic_checkpoints

__all__ = ["MOMENTS"]


def die() -> None:
    """Kill the process group."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, torn: Callable[..., None] | None = None) -> None:
    """Die at a call of ``owner.name``, after it has been done in part by ``torn``."""
    original, calls = getattr(owner, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            if torn is not None:
                torn(*args, **kwargs)
            die()
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def half_a_checkpoint(number: int) -> None:
    """Half of the bytes of a checkpoint are written."""
    save, calls = torch.save, [0]

    def halved(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        save(content, file, *args, **kwargs)
        if str(getattr(file, "name", "")).endswith("-rank0.pt"):
            calls[0] += 1
            if calls[0] == number:
                file.truncate(file.tell() // 2)
                file.flush()
                die()

    torch.save = halved  # type: ignore[assignment]


def before_rename(name: str) -> None:
    """A file is written and does not have its name yet."""
    replace = os.replace

    def watched(source: Any, target: Any, **kwargs: Any) -> None:
        if Path(target).name == name:
            die()
        replace(source, target, **kwargs)

    os.replace = watched  # type: ignore[assignment]


def half_a_picture(figure: Any, path: Any, **_: Any) -> None:
    """A picture's first bytes."""
    Path(path).write_bytes(b"\x89PNG\r\n")


MOMENTS: dict[str, Callable[[], None]] = {
    "half a checkpoint": partial(half_a_checkpoint, 3),
    "inside the attack": partial(at_call, branch, "pgd_attack", 17),
    "conversion of the data": partial(at_call, MDSWriter, "write", 40),
    "final export": partial(before_rename, "encoder.pt"),
    "between checkpoint and link": partial(at_call, atomic_checkpoints, "link", 2),
    "first checkpoint": partial(half_a_checkpoint, 1),
    "half a picture": partial(at_call, Figure, "savefig", 2, half_a_picture),
    "before a checkpoint has its name": partial(before_rename, "ep1-ba15-rank0.pt"),
    "recipe.yaml": partial(before_rename, "recipe.yaml"),
    "while an old checkpoint is removed": partial(at_call, atomic_checkpoints, "remove", 1),
}
