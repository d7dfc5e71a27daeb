"""Texts for people: a curve in one line, a few of many names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Return a curve as a line of bars, the highest value filling the line.

    Args:
        values: numbers, at least one; bars count from 0 (or the lowest, if that is negative).
            A gap (None or NaN) is a space.
        width: how many characters at most; longer curves are sampled evenly, both ends kept.

    Returns:
        One character a value.

    Example:
        >>> sparkline([0, 1, 2, 3, 2, 1, 0])
        '▁▃▆█▆▃▁'
    """
    count = len(values)
    if count > width > 1:
        values = [values[round(i * (count - 1) / (width - 1))] for i in range(width)]
    known = [value for value in values if value is not None and math.isfinite(value)]
    low, high = min([0.0, *known]), max([0.0, *known])
    span = (high - low) or 1.0
    return "".join(_bar(value, low, span) for value in values)


def _bar(value: float | None, low: float, span: float) -> str:
    if value is None or not math.isfinite(value):
        return " "
    return _BARS[math.floor((value - low) / span * (len(_BARS) - 1) + 0.5)]


def listed(names: Sequence[str], limit: int = 3) -> str:
    """Return a few names and how many more there are, such as `"a, b and 4 more"`."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def agree(names: Sequence[object], one: str, many: str) -> str:
    """Return the form of a word that goes with one name, or that for several."""
    return one if len(names) == 1 else many


def quoted(names: Iterable[object], limit: int = 3) -> str:
    """Return a few names in quotes and how many more there are."""
    return listed([repr(name) for name in names], limit)
