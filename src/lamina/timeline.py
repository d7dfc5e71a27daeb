"""The one function that decides every value: `values_at(resolved, step, feedback)`.

    lr applied at step k = lr(k) * schedule(k) * feedback * rewarm(k - thaw)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import ScheduleError
from .resolved import Cell, Resolved, Setting
from .schedules import Schedule


@dataclass(frozen=True)
class Feedback:
    """What happened during the run that values depend on, beside the step.

    `overrides[group][key]` replaces what the plan's rules gave for a hyperparameter, by the name
    of the group; the schedule still multiplies lr.
    """

    overrides: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


NO_FEEDBACK = Feedback()


class Values:
    """All values at one step (floats) or at an array of steps (arrays), worked out lazily.

    Each distinct schedule is evaluated once; a group's value is its base times that curve.
    """

    def __init__(self, resolved: Resolved, step: Any, feedback: Feedback) -> None:
        self._resolved = resolved
        self._feedback = feedback
        self._scalar = np.ndim(step) == 0
        self._steps = np.atleast_1d(np.asarray(step, dtype=np.float64))
        self._step = float(step) if self._scalar else 0.0
        self._curves: dict[Schedule, Any] = {}

    def hyper(self, index: int) -> dict[str, Any]:
        """The hyperparameters of a cell; lr is 0 while it is frozen."""
        cell = self._resolved.cells[index]
        values = dict(cell.constants)
        for key, setting in cell.moving:
            values[key] = (
                tuple(map(self._value, setting))
                if isinstance(setting, tuple)
                else self._value(setting)
            )
        values.update(self._feedback.overrides.get(cell.name, ()))
        if "lr" in values:
            values["lr"] = self._lr(cell, values["lr"])
        return values

    def lr(self, index: int) -> Any:
        """The learning rate of a cell."""
        return self.hyper(index)["lr"]

    def active(self, index: int) -> Any:
        """Whether a cell trains."""
        return self._inside(self._resolved.cells[index])

    def _inside(self, cell: Cell) -> Any:
        windows = cell.windows
        if self._scalar:
            step = self._step
            return any(begin <= step and (end is None or step < end) for begin, end in windows)
        inside = np.zeros(self._steps.shape, dtype=bool)
        for begin, end in windows:
            inside |= (self._steps >= begin) & (True if end is None else self._steps < end)
        return inside

    def threshold(self, scope: int) -> Any:
        """The clip threshold of a scope."""
        return self._value(self._resolved.scopes[scope].threshold)

    def _lr(self, cell: Cell, lr: Any) -> Any:
        if cell.schedule is not None:
            lr = lr * self._curve(cell.schedule)
        if cell.rewarm is not None:
            lr = lr * self._rewarm(cell)
        active = self._inside(cell)
        if self._scalar:
            return float(lr) if active else 0.0
        return np.where(active, lr, 0.0)

    def _rewarm(self, cell: Cell) -> Any:
        """The factor after a thaw; a part that trains from step 0 has no thaw."""
        assert cell.rewarm is not None
        factor = np.ones_like(self._steps)
        for begin, _ in cell.windows:
            since = self._steps - begin
            if begin > 0:
                factor = np.where(since >= 0, cell.rewarm.at(np.maximum(since, 0.0)), factor)
        return float(factor[0]) if self._scalar else factor

    def _value(self, setting: Setting) -> Any:
        value = setting.scale
        for curve in setting.curves:
            value = value * self._curve(curve)
        return value

    def _curve(self, schedule: Schedule) -> Any:
        if schedule not in self._curves:
            values = schedule.at(self._steps)
            bad = ~((values >= 0) & np.isfinite(values))
            if bad.any():
                place = int(np.argmax(bad))
                raise ScheduleError(
                    f"{schedule!r} gives {values[place]:g} at step {self._steps[place]:g}; "
                    "expected a finite number of at least 0 at every step."
                )
            self._curves[schedule] = float(values[0]) if self._scalar else values
        return self._curves[schedule]


def values_at(resolved: Resolved, step: Any, feedback: Feedback = NO_FEEDBACK) -> Values:
    """Every value of a resolved plan at a step (or an array of steps), counted from 0.

    Pure: the same arguments give the same values, in any order. `Optimizer.step` applies what
    this returns; preview, explain and the logs show it.
    """
    return Values(resolved, step, feedback)
