"""The one function that decides every value: `values_at(resolved, step, feedback)`.

lr applied at step k = lr(k) * schedule(k) * feedback * rewarm(k - thaw)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import ScheduleError
from ..gradients.operations import Operation
from ..plan.history import value_at
from ..schedules import Schedule
from ..schedules.base import Floats
from .resolved import ALWAYS, Cell, Resolved, Setting, Trigger, each_part


@dataclass(frozen=True)
class Feedback:
    """What happened during the run that values depend on, beside the step.

    `overrides[group]` lists `[begin, {key: value}]`: from that step on these replace what the
    rules gave, and the schedule still multiplies lr. `seen[key]` is what a reaction has seen.
    """

    overrides: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seen: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def opened(self, trigger: Trigger) -> float:
        """Return the step at which a thaw that waits for a metric begins, or infinity."""
        step = self.seen.get(trigger.key, {}).get("opened")
        return math.inf if step is None else float(step)

    def windows(self, cell: Cell) -> list[tuple[float, float]]:
        """Return the windows of a cell as numbers; one that waits begins at infinity."""
        return [
            (
                self.opened(begin) if isinstance(begin, Trigger) else float(begin),
                math.inf if end is None else float(end),
            )
            for begin, end in cell.windows
        ]


NO_FEEDBACK = Feedback()


def product(setting: Setting, curve: Callable[[Schedule], Any]) -> Any:
    """Return the scale times what `curve` makes of each schedule."""
    value = setting.scale
    for schedule in setting.curves:
        value = value * curve(schedule)
    return value


def _given(cell: Cell, curve: Callable[[Schedule], Any]) -> dict[str, Any]:
    values = dict(cell.constants)
    for key, setting in cell.moving:
        values[key] = each_part(setting, lambda part: product(part, curve))
    return values


def given_at(cell: Cell, step: int) -> dict[str, Any]:
    """Return what the rules give at a step, before overrides and the factors on lr."""
    return _given(cell, lambda schedule: float(schedule(step)))


class Values:
    """All values at one step (floats) or at an array of steps (arrays), worked out lazily.

    Each distinct schedule is evaluated once; a group's value is its base times that curve.
    """

    def __init__(self, resolved: Resolved, step: Any, feedback: Feedback) -> None:
        self._resolved = resolved
        self._feedback = feedback
        self._given = step
        self._scalar = isinstance(step, int) or np.ndim(step) == 0
        self._step = float(step) if self._scalar else 0.0
        #: by the id of a schedule: of those that are equal, `resolve` has made one
        self._curves: dict[int, Any] = {}

    @cached_property
    def _steps(self) -> Any:
        return np.atleast_1d(np.asarray(self._given, dtype=np.float64))

    def hyper(self, index: int) -> dict[str, Any]:
        """Return the hyperparameters of a cell; lr is 0 while it is frozen."""
        cell = self._resolved.cells[index]
        values = _given(cell, self._curve)
        self._override(values, cell)
        if "lr" in values:
            values["lr"] = self._lr(cell, values["lr"])
        return values

    def lr(self, index: int) -> Any:
        """Return the learning rate of a cell."""
        return self.hyper(index)["lr"]

    def active(self, index: int) -> Any:
        """Return whether the cell of this index trains."""
        cell = self._resolved.cells[index]
        return True if self._scalar and cell.windows == ALWAYS else self.inside(cell)

    def inside(self, cell: Cell) -> Any:
        """Return whether a cell trains."""
        windows = self._feedback.windows(cell)
        if self._scalar:
            return any(begin <= self._step < end for begin, end in windows)
        inside = np.zeros(self._steps.shape, dtype=bool)
        for begin, end in windows:
            inside |= (self._steps >= begin) & (self._steps < end)
        return inside

    def _override(self, values: dict[str, Any], cell: Cell) -> None:
        history = self._feedback.overrides.get(cell.name, ())
        if not history:
            return
        if self._scalar:  # one look, however many overrides there were
            values.update(value_at(history, self._step, {}))
            return
        planned = {key: values[key] for _, changed in history for key in changed}
        for begin, changed in history:
            for key, value in planned.items():
                now = changed.get(key, value)
                values[key] = np.where(self._steps >= begin, now, values[key])

    def operations(self, scope: int) -> list[tuple[Operation, Any]]:
        """Return the gradient operations of a scope with their numbers."""
        listed = self._resolved.scopes[scope].operations
        return [(operation, product(amount, self._curve)) for operation, amount in listed]

    def _lr(self, cell: Cell, lr: Any) -> Any:
        if cell.schedule is not None:
            lr = lr * self._curve(cell.schedule)
        if cell.feedback is not None:
            lr = lr * self.reaction(cell.feedback)
        if cell.rewarm is not None:
            lr = lr * self._rewarm(cell)
        if cell.windows == ALWAYS:
            return float(lr) if self._scalar else lr + np.zeros_like(self._steps)
        active = self.inside(cell)
        if self._scalar:
            return float(lr) if active else 0.0
        return np.where(active, lr, 0.0)

    def reaction(self, key: str) -> Any:
        """Return the multiplier of a plateau; one that has not reacted yet is 1."""
        changes = self._feedback.seen.get(key, {}).get("changes", ())
        if self._scalar:
            return value_at(changes, self._step, 1.0)
        factor: Any = 1.0
        for begin, multiplier in changes:
            factor = np.where(self._steps >= begin, multiplier, factor)
        return factor

    def _rewarm(self, cell: Cell) -> Any:
        """Return the factor after a thaw; a part that trains from step 0 has no thaw."""
        assert cell.rewarm is not None
        thaws = [begin for begin, _ in self._feedback.windows(cell) if 0 < begin < math.inf]
        place = np.searchsorted(thaws, self._steps, side="right")
        if not place.any():
            return 1.0 if self._scalar else np.ones_like(self._steps)
        # Only the last thaw before a step counts, so that one evaluation serves all of them.
        latest = np.array([math.inf, *thaws])[place]
        since = np.where(place > 0, self._steps - latest, 0.0)
        factor = np.where(place > 0, cell.rewarm.at(since), 1.0)
        return float(factor[0]) if self._scalar else factor

    def _curve(self, schedule: Schedule) -> Any:
        curve = self._curves.get(id(schedule))
        if curve is None:
            values = judged_values(schedule, self._steps)
            curve = self._curves[id(schedule)] = float(values[0]) if self._scalar else values
        return curve


def judged_values(schedule: Schedule, steps: Floats, where: str = "") -> Floats:
    """Return the values of a schedule at some steps, all of them finite and at least 0.

    Raises:
        ScheduleError: for any other value, naming its step; the message begins with `where`.
    """
    values = schedule.at(steps)
    bad = ~((values >= 0) & np.isfinite(values))
    if bad.any():
        place = int(np.argmax(bad))
        raise ScheduleError(
            f"{where}{schedule!r} gives {values[place]:g} at step {steps[place]:g}; "
            "expected a finite number of at least 0 at every step."
        )
    return values


def values_at(resolved: Resolved, step: Any, feedback: Feedback = NO_FEEDBACK) -> Values:
    """Return every value of a resolved plan at a step (or an array of steps), counted from 0.

    Pure: the same arguments give the same values, in any order. `Optimizer.step` applies what
    this returns; preview, explain and the logs show it.
    """
    return Values(resolved, step, feedback)


class FixedStep(Values):
    """The values of one step, whatever the clock says; the lr of some groups times a factor.

    So a learning-rate range test trains: schedules and windows stand still while the lr is swept.
    """

    def __init__(
        self, resolved: Resolved, step: int, feedback: Feedback, factors: Mapping[int, float]
    ) -> None:
        super().__init__(resolved, step, feedback)
        self._factors = factors

    def hyper(self, index: int) -> dict[str, Any]:
        """Return the hyperparameters of a cell."""
        values = super().hyper(index)
        if index in self._factors and "lr" in values:
            values["lr"] *= self._factors[index]
        return values


class Spliced(Values):
    """The values of one settlement of a plan before a step, those of another from it on.

    So is a run that was settled anew at this step, its clock then.
    """

    def __init__(self, before: Values, after: Values, step: Any, clock: int) -> None:
        self._before, self._after, self._past = before, after, np.asarray(step) < clock
        cells, known = after._resolved.cells, before._resolved.cell_of
        # By parameter, as equal names need not be equal groups. A group whose parameters were in
        # several shows the past of the first; `Preview.at` and `explain` know that of each.
        self._earlier = [known[cell.parameters[0].name] for cell in cells]

    def hyper(self, index: int) -> dict[str, Any]:
        """Return the hyperparameters of a cell."""
        old, new = self._before.hyper(self._earlier[index]), self._after.hyper(index)
        return {key: self._pick(old[key], new[key]) for key in new}

    def active(self, index: int) -> Any:
        """Return whether the cell of this index trains."""
        earlier = self._earlier[index]
        return self._pick(self._before.active(earlier), self._after.active(index))

    def operations(self, scope: int) -> list[tuple[Operation, Any]]:
        """Return the gradient operations of a scope with their numbers."""
        pairs = zip(self._before.operations(scope), self._after.operations(scope), strict=True)
        return [(operation, self._pick(old, new)) for (_, old), (operation, new) in pairs]

    def _pick(self, old: Any, new: Any) -> Any:
        if isinstance(new, tuple):
            return tuple(map(self._pick, old, new))
        if np.ndim(self._past) == 0:
            return old if self._past else new
        same = not isinstance(new, np.ndarray) and not isinstance(old, np.ndarray) and old == new
        return new if same else np.where(self._past, old, new)
