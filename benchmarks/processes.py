"""Run a command that ends with this process, and all that it has started with it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

__all__ = ["execute", "last_line"]

GRACE = 10.0  # seconds to clean up in


def execute(
    command: Sequence[str],
    *,
    output: IO[bytes],
    errors: IO[bytes],
    folder: Path,
    environment: Mapping[str, str],
    seconds: float | None = None,
) -> int | None:
    """Run a command.

    Args:
        command: The words.
        output: Where its standard output goes.
        errors: Where its standard error goes.
        folder: Where it runs.
        environment: All of its variables.
        seconds: How long it may take; ``None``: any time.

    Returns:
        Its exit code; ``None`` if the time was up.
    """
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        process_group=0,  # so that its workers end with it
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def last_line(log: Path) -> str:
    """The last line of a log, at most 200 letters."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip()[:200] if lines else ""


def _end_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it dies, in whatever way."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and all that it has started: first as Ctrl-C does, for it to remove its scratch files."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
