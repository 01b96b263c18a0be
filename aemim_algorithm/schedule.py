"""Arguments that change during a run, written as ``"linear 0→2 over 0.1dur"``.

A number stays a number. A schedule is a string, so that it stands in a recipe and in ``repr`` as it
stands in a script; Composer's own schedulers compute it, and so it resumes by itself.
"""

from __future__ import annotations

import re
from typing import Any

from composer.core import State
from composer.core.time import Time, TimeUnit
from composer.optim import CosineAnnealingScheduler, LinearScheduler

from aemim_algorithm.validation import require_number

__all__ = ["Schedule", "largest", "parse_schedule", "schedule_text", "value_at"]

_PATTERN = re.compile(r"(linear|cosine)\s+(\S+?)\s*(?:→|->)\s*(\S+)\s+over\s+(\S+)")


class Schedule:
    """A value that goes from ``start`` to ``end`` during ``duration``, and then stays.

    Args:
        kind: ``"linear"`` or ``"cosine"``.
        start: Value at the start of training.
        end: Value after ``duration``.
        duration: A time string of Composer's: ``"0.1dur"``, ``"5ep"``, ``"100ba"``.

    Raises:
        ValueError: If ``duration`` is none.
    """

    def __init__(self, kind: str, start: float, end: float, duration: str) -> None:
        self.start, self.end = start, end
        self._share = (
            LinearScheduler(alpha_i=1.0, alpha_f=0.0, t_max=duration)
            if kind == "linear"
            else CosineAnnealingScheduler(t_max=duration)
        )

    def __call__(self, state: State) -> float:
        """The value at the time of ``state``."""
        try:
            share = self._share(state)
        except ZeroDivisionError:  # a share of the run that is less than a batch
            share = 0.0
        return self.start * share + self.end * (1 - share)


def schedule_text(value: object) -> Any:
    """Composer's linear or cosine scheduler as a string; anything else as it is."""
    if type(value) is LinearScheduler:
        kind, start = "linear", value.alpha_i
    elif type(value) is CosineAnnealingScheduler:
        kind, start = "cosine", 1.0
    else:
        return value
    duration = value.t_max if isinstance(value.t_max, str) else value.t_max.to_timestring()
    return f"{kind} {float(start)}→{float(value.alpha_f)} over {duration}"


def parse_schedule(
    name: str, value: float | str, *, low: float, high: float, low_open: bool = False, unit: str = ""
) -> float | Schedule:
    """Read an argument that may be a number or a schedule.

    Args:
        name: Name of the argument, for the message.
        value: A number, or ``"linear START→END over TIME"``; ``cosine`` likewise, ``->`` for ``→``.
        low: Smallest value allowed, at any time.
        high: Largest value allowed.
        low_open: Whether ``low`` itself is out.
        unit: Unit of the value, for the message.

    Returns:
        The number, or the schedule.

    Raises:
        ValueError: If it is neither, or leaves the range.
    """
    if not isinstance(value, str):
        require_number(name, value, low=low, high=high, low_open=low_open, unit=unit)
        return value
    match = _PATTERN.fullmatch(value.strip())
    try:
        if match is None:
            raise ValueError
        start, end = float(match[2]), float(match[3])
        duration = Time.from_timestring(match[4])
        if duration.value <= 0 or duration.unit == TimeUnit.SECOND:
            raise ValueError
        schedule = Schedule(match[1], start, end, match[4])
    except ValueError:
        allowed = f"{'(' if low_open else '['}{low:g}, {high:g}]{unit}"
        raise ValueError(
            f"{name}={value!r} is neither a number in {allowed} nor a schedule such as "
            "'linear 0→2 over 0.1dur' or 'cosine 1→0.5 over 20ep'"
        ) from None
    for end_of_it in (start, end):
        require_number(name, end_of_it, low=low, high=high, low_open=low_open, unit=unit)
    return schedule


def largest(value: float | Schedule) -> float:
    """The largest value that an argument will have."""
    return max(value.start, value.end) if isinstance(value, Schedule) else value


def value_at(state: State | None, name: str, value: float | Schedule) -> float:
    """The value of an argument at the time of ``state``.

    Raises:
        ValueError: If it is a schedule and there is no Trainer's state.
    """
    if not isinstance(value, Schedule):
        return value
    if state is None:
        raise ValueError(f"{name} is a schedule, which needs a Trainer's time: pass a number")
    return value(state)
