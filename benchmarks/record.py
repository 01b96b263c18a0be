"""What a benchmark result has to carry, as the package's own results do; shared by all benchmarks."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aemim_algorithm import environment as package
from aemim_algorithm.environment import write_json

__all__ = ["environment", "write_json"]


def environment(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Where, when and how a result came about: see :func:`aemim_algorithm.environment.environment`.

    Args:
        script: Path of the script in the repository.
        arguments: Its command line.

    Returns:
        ``commit``, too: of this repository, ending in ``-dirty`` where tracked files differ from it; ``None``
        outside of git.
    """
    return package.environment(["python", script, *arguments]) | {"commit": _commit()}


def _commit() -> str | None:
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(
            describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
