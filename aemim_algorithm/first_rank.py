"""What the first process does for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from composer.utils import dist

__all__ = ["on_first_rank"]

T = TypeVar("T")


def on_first_rank(do: Callable[[], T]) -> T:
    """Do something on the first process; all learn what came of it, so that none waits in vain.

    All processes call this. It must not take longer than a collective's timeout.

    Args:
        do: What to do; its result must be one that can be pickled.

    Returns:
        Its result, on every process.

    Raises:
        Exception: Its own, where it failed; elsewhere a `ValueError` with the same message.
    """
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_global_rank() == 0:
        try:
            outcome[0] = do()
        except Exception as error:
            failure, outcome[1] = error, str(error) or type(error).__name__
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    result: T = outcome[0]
    return result
