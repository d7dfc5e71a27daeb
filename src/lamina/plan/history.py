"""Values that change during a run at steps nobody knew before: overrides and plateaus.

A history is a list of `[step, value]` in the order of the steps; each value holds from its step on.
Only the last `LONGEST_HISTORY` changes are kept, so that neither the saved state nor the time of a
step grows with the length of a run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

#: how many changes are remembered; of steps before the oldest, the plan's own value is shown
LONGEST_HISTORY = 256

_step_of = itemgetter(0)


def extended(history: Sequence[Any], step: int, value: Any) -> list[Any]:
    """Return a new history in which a value holds from a step on.

    A second change at the same step replaces the first, and a value that holds already is no
    change.

    Args:
        history: the changes so far.
        step: from which step on the value holds; not before the last change.
        value: the new value.
    """
    earlier = list(history)
    if earlier and earlier[-1][0] == step:
        earlier.pop()
    if earlier and earlier[-1][1] == value:
        return earlier
    return [*earlier, [step, value]][-LONGEST_HISTORY:]


def value_at(history: Sequence[Any], step: float, default: Any) -> Any:
    """Return the value that holds at a step, or the default before the first change."""
    place = bisect_right(history, step, key=_step_of)
    return history[place - 1][1] if place else default
