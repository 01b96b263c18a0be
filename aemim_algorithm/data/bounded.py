"""Waiting that ends: for what has no time limit of its own, or a much longer one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Thread

from streaming.base.shared import SharedBarrier

__all__ = ["BoundedBarrier", "within"]


def within(seconds: float, action: Callable[[], object]) -> None:
    """Do something that has no time limit of its own, or a much longer one.

    Args:
        seconds: How long it may take.
        action: What to do. If it takes longer it is left behind, in a thread that ends with the process.

    Raises:
        TimeoutError: It took longer.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"did not arrive within {seconds:g} s")
    if raised:
        raise raised[0]


class BoundedBarrier(SharedBarrier):
    """Streaming's barrier of a machine's processes, in which nobody waits for ever for one that has died.

    Args:
        barrier: Whose shared memory and lock this one uses.
        seconds: How long a process may wait for the others.
    """

    def __init__(self, barrier: SharedBarrier, *, seconds: float) -> None:
        self.__dict__ = barrier.__dict__  # streaming takes the lock away, and gives it back in each process
        self.seconds = seconds

    def __call__(self, num_procs: int) -> None:
        """Enter, wait for the others, and leave.

        Args:
            num_procs: How many processes share this barrier.

        Raises:
            TimeoutError: The others did not come.
        """
        try:
            within(self.seconds, partial(super().__call__, num_procs))
        except TimeoutError:
            raise TimeoutError(
                f"the other loader processes of this machine did not come within {self.seconds:g} s: see the "
                "log of the first one that ended"
            ) from None
