"""One curve in bounded memory: the newest points in full, the older ones thinned evenly."""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

Steps = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_NO_STEPS: Steps = np.empty(0, np.int64)
_NO_VALUES: Floats = np.empty(0)


class Series:
    """The points (step, value) of one number over a run, in the order of their steps.

    The newest `capacity` points, and up to as many more, are kept as they are. Older ones are
    thinned to about `points`, so that no spike is hidden: see `thin`.

    Args:
        capacity: how many of the newest points are kept in full.
        points: about how many older points are kept.
    """

    __slots__ = (
        "_capacity", "_full", "_new_steps", "_new_values", "_old_steps", "_old_values", "_points",
    )  # fmt: skip

    def __init__(self, capacity: int, points: int) -> None:
        self._capacity = capacity
        self._full = 2 * capacity
        self._points = points
        self._new_steps, self._new_values = array("q"), array("d")
        self._old_steps: Steps = _NO_STEPS
        self._old_values: Floats = _NO_VALUES

    def add(self, step: int, value: float) -> None:
        """Add a point; of a step that is not the newest (a tensor read late) too."""
        steps = self._new_steps
        steps.append(step)
        self._new_values.append(value)
        if len(steps) >= self._full:
            self._age()

    def extend(self, steps: Steps, values: Floats) -> None:
        """Add many points at once, as they come from a file."""
        self._old_steps = np.concatenate([self._old_steps, steps])
        self._old_values = np.concatenate([self._old_values, values])
        self._tidy()

    def arrays(self) -> tuple[Steps, Floats]:
        """Return steps and values, in the order of steps; of a step given twice, the last value."""
        steps = np.concatenate([self._old_steps, np.array(self._new_steps, np.int64)])
        values = np.concatenate([self._old_values, np.array(self._new_values, np.float64)])
        return _in_order(steps, values)

    def cut(self, step: int) -> None:
        """Forget this step and what follows it."""
        steps, values = self.arrays()
        keep = steps < step
        del self._new_steps[:], self._new_values[:]
        self._old_steps, self._old_values = steps[keep], values[keep]

    def _age(self) -> None:
        """Move the older half of the newest points to the thinned ones."""
        count = self._capacity
        steps = np.array(self._new_steps[:count], np.int64)
        values = np.array(self._new_values[:count], np.float64)
        del self._new_steps[:count], self._new_values[:count]
        self.extend(steps, values)

    def _tidy(self) -> None:
        # Twice as many are let in before they are thinned: so each point is looked at about twice.
        if len(self._old_steps) > 2 * self._points:
            ordered = _in_order(self._old_steps, self._old_values)
            self._old_steps, self._old_values = thin(*ordered, self._points)


def thin(steps: Steps, values: Floats, points: int) -> tuple[Steps, Floats]:
    """Return at most about `points` of the points, evenly over the steps, without hiding a spike.

    The steps are cut into `points / 2` equal spans. Of each span stay its lowest and its highest
    value, at the steps at which they stood, and its first value that is NaN or infinite; the first
    and the last point of all stay too. Thinning what was thinned loses no extreme.

    Args:
        steps: in ascending order.
        values: one for each step.
        points: about how many to keep.
    """
    if len(steps) <= points:
        return steps, values
    spans = max(1, points // 2)
    first, last = int(steps[0]), int(steps[-1])
    # As floats: the product of a step and the number of spans may pass 64 bits.
    span = ((steps - first) / (last - first + 1) * spans).astype(np.int64)
    finite = np.isfinite(values)
    kept = [np.array([0, len(steps) - 1])]
    places = np.flatnonzero(finite)
    if len(places):
        order = places[np.lexsort((values[places], span[places]))]
        begins = np.flatnonzero(np.diff(span[order], prepend=-1))
        ends = np.append(begins[1:], len(order)) - 1
        kept += [order[begins], order[ends]]
    bad = np.flatnonzero(~finite)
    if len(bad):
        kept.append(bad[np.flatnonzero(np.diff(span[bad], prepend=-1))])
    chosen = np.unique(np.concatenate(kept))
    return steps[chosen], values[chosen]


def _in_order(steps: Steps, values: Floats) -> tuple[Steps, Floats]:
    """Return the points in the order of steps; of equal steps the one that was added last."""
    apart = np.diff(steps)
    if np.all(apart > 0):
        return steps, values
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last = np.append(np.diff(steps) > 0, True)
    return steps[last], values[last]
