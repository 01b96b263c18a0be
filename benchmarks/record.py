"""What a benchmark result has to carry, as the package's own results do; shared by all benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aemim_algorithm import environment as package
from aemim_algorithm.environment import write_json

__all__ = ["environment", "write_json"]


def environment(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Where, when and how a result came about: see :func:`aemim_algorithm.environment.environment`.

    Args:
        script: Path of the script in the repository.
        arguments: Its command line.
    """
    return package.environment(["python", script, *arguments])
