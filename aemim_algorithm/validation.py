"""Checks of arguments that say what was given, what is allowed and what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Real

__all__ = ["nearest", "require_choice", "require_integer", "require_number", "require_per_channel"]


def require_number(
    name: str,
    value: object,
    *,
    low: float,
    high: float = math.inf,
    low_open: bool = False,
    unit: str = "",
) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite real number in [low, high] or (low, high]."""
    allowed = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}{unit}"
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not (low < value if low_open else low <= value) or value > high:  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} is out of range: expected a number in {allowed}")


def require_integer(name: str, value: object, *, low: int) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer of at least ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}={value!r} is out of range: expected an integer >= {low}")


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``; names the nearest one."""
    options = sorted(choices)
    if not isinstance(value, str) or value not in options:
        close = nearest(str(value), options)
        raise ValueError(
            f"{name}={value!r} is unknown: expected one of {', '.join(map(repr, options))}"
            + (f", did you mean {close!r}?" if close else "")
        )


def require_per_channel(name: str, value: object, *, positive: bool = False) -> None:
    """Raise ``ValueError`` unless ``value`` holds a number in [0, 1], or (0, 1], for each channel."""
    numbers = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else []
    for number in numbers or [None]:
        try:
            require_number(name, number, low=0, high=1, low_open=positive)
        except ValueError:
            raise ValueError(
                f"{name}={value!r} is out of range: expected a number in {'(' if positive else '['}0, 1] for "
                "each channel, as pixels are those of [0, 1]"
            ) from None


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one was probably meant to be, if any is near."""
    candidates = sorted(known)
    longer = [candidate for candidate in candidates if name and name in candidate]
    close = longer[:1] or difflib.get_close_matches(name, candidates, n=1, cutoff=0.65)
    return close[0] if close else None
