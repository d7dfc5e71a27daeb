"""A schedule is a frozen value and a pure function of the step.

A *factor* multiplies a hyperparameter (`cosine(to=0.01)`); a *value* is one (`linear(0.04, 0.4)`).
Lengths may be given in any unit of time; `bind` settles them for a run, in whole steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from .._util.grammar import Expression, to_source
from .._util.text import sparkline
from ..errors import ScheduleError
from .duration import Run

if TYPE_CHECKING:
    import os

Floats = npt.NDArray[np.float64]

FACTOR, VALUE, EITHER = "factor", "value", "either"


class Schedule(Expression, ABC):
    """What all schedules share: `a >> b` one after the other, `a * b` product, calling."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """`factor`, `value`, or `either` (the place where it stands decides)."""

    @abstractmethod
    def duration(self, run: Run) -> Fraction | None:
        """Return the exact length in steps, or None for the rest of the run."""

    @abstractmethod
    def bind(self, run: Run, start: Fraction = Fraction(0), end: Fraction | None = None) -> Self:
        """Return the same schedule with its lengths in whole steps.

        `start` and `end` are its exact place in the run; boundaries round up, so that phases
        given as shares of the run meet without a gap.
        """

    @abstractmethod
    def at(self, steps: Floats) -> Floats:
        """Return the values at an array of steps (float64, counted from 0); for bound schedules."""

    def __call__(self, step: Any, *, run: Run | None = None) -> Any:
        """Return the value at one step (a float) or at each of an array of steps."""
        bound = self.bind(run or Run())
        array = np.asarray(step, dtype=np.float64)
        if array.size and array.min() < 0:
            raise ScheduleError(f"{self!r} was asked for step {array.min():g}; steps count from 0.")
        values = bound.at(array.reshape(-1)).reshape(array.shape)
        return float(values) if array.ndim == 0 else values

    def __rshift__(self, other: object) -> Schedule:
        """Join two schedules: first this one for its length, then the other."""
        if not isinstance(other, Schedule):
            _refuse(self, ">>", other)
            return NotImplemented
        return Sequence((*phases_of(self), *phases_of(other)))

    def __rrshift__(self, other: object) -> Any:
        _refuse(self, ">>", other)
        return NotImplemented

    def __mul__(self, other: object) -> Schedule:
        """Return the product of two schedules, step by step."""
        if not isinstance(other, Schedule):
            _refuse(self, "*", other)
            return NotImplemented
        return Product(self, other)

    def __rmul__(self, other: object) -> Any:
        _refuse(self, "*", other)
        return NotImplemented

    def plot(
        self,
        *others: Schedule,
        steps: int | None = None,
        steps_per_epoch: int | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> Any:
        """Return a picture of this schedule, and of others on the same axis (needs matplotlib).

        Args:
            others: more schedules.
            steps: how many steps to show, the length of the run; by default that of the longest.
            steps_per_epoch: the steps of an epoch, if a length is given in epochs.
            path: a file to write, such as "schedule.png".

        Returns:
            A `matplotlib.figure.Figure`.
        """
        from .pictures import plot

        shown = (self, *others)
        run = _run_of(shown, steps, steps_per_epoch)
        curves = {repr(one): one.bind(run).at for one in shown}
        return plot(curves, run.steps or 0, path)

    def sparkline(
        self, steps: int | None = None, *, steps_per_epoch: int | None = None, width: int = 40
    ) -> str:
        """Return the curve as one line of text, for a terminal; arguments as in `plot`."""
        run = _run_of((self,), steps, steps_per_epoch)
        last = (run.steps or 1) - 1
        places = np.unique(np.linspace(0, last, min(width, last + 1)).round())
        return sparkline(list(self.bind(run).at(places)), width)


def _refuse(schedule: Schedule, op: str, other: object) -> None:
    """Raise `ScheduleError` for what people join with a schedule; of others Python says enough."""
    if isinstance(other, type) and issubclass(other, Schedule):
        raise ScheduleError(f"{other.source_name} is not called; write {other.source_name}(...).")
    if op == "*" and isinstance(other, (int, float)):
        raise ScheduleError(
            f"{schedule!r} cannot be multiplied with the number {other!r}; write lr={other!r} and "
            f"schedule={schedule!r}, or as a schedule {schedule!r} * constant({other!r})."
        )


def phases_of(schedule: Schedule) -> tuple[Schedule, ...]:
    """Return the phases of a sequence, or the schedule itself as the only one."""
    return schedule.phases if isinstance(schedule, Sequence) else (schedule,)


def joined_kind(op: str, parts: tuple[Schedule, ...]) -> str:
    """Return the kind of a composition; raises if its parts do not go together."""
    known = [part.kind for part in parts]  # once: each asks all of its own parts
    kinds = set(known) - {EITHER}
    values = known.count(VALUE)
    if (op == ">>" and len(kinds) > 1) or (op == "*" and values > 1):
        listed = ", ".join(f"{part!r} is a {part.kind}" for part in parts)
        raise ScheduleError(
            f"{op!r} cannot join these: {listed}. A factor multiplies a hyperparameter, a value "
            "(with an absolute start) is one; give all phases a start, or none."
        )
    if VALUE in kinds:
        return VALUE
    return FACTOR if kinds else EITHER


def _run_of(schedules: tuple[Schedule, ...], steps: int | None, steps_per_epoch: int | None) -> Run:
    """Return the run to show: as given, or as long as the longest schedule."""
    if steps is not None and steps < 1:
        raise ScheduleError(f"steps={steps} is out of range; expected 1 or more.")
    if steps is None:
        run = Run(None, steps_per_epoch)
        lengths = [one.duration(run) for one in schedules]
        if any(length is None for length in lengths):
            raise ScheduleError(
                f"{schedules[lengths.index(None)]!r} lasts for the rest of the run; pass steps=."
            )
        steps = max(1, *(math.ceil(length) for length in lengths if length is not None))
    return Run(steps, steps_per_epoch)


@dataclass(frozen=True, repr=False)
class Sequence(Schedule):
    """Schedules one after the other; at most one of them may last for the rest of the run."""

    source_name: ClassVar[str] = ">>"
    phases: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        joined_kind(">>", self.phases)

    def source_text(self, quote: bool) -> str:
        return " >> ".join(spell_part(phase, quote) for phase in self.phases)

    @property
    def kind(self) -> str:
        return joined_kind(">>", self.phases)

    def duration(self, run: Run) -> Fraction | None:
        lengths = [phase.duration(run) for phase in self.phases]
        known = [length for length in lengths if length is not None]
        return sum(known, Fraction(0)) if len(known) == len(lengths) else None

    def bind(self, run: Run, start: Fraction = Fraction(0), end: Fraction | None = None) -> Self:
        lengths = self._lengths(run, start, end)
        bound, place = [], start
        for phase, length in zip(self.phases, lengths, strict=True):
            stop = None if length is None else place + length
            bound.append(phase.bind(run, place, stop))
            place = stop if stop is not None else place
        return replace(self, phases=tuple(bound))

    def _lengths(self, run: Run, start: Fraction, end: Fraction | None) -> list[Fraction | None]:
        lengths = [phase.duration(run) for phase in self.phases]
        open_ends = [i for i, length in enumerate(lengths) if length is None]
        if len(open_ends) > 1:
            listed = " and ".join(repr(self.phases[i]) for i in open_ends)
            raise ScheduleError(
                f"{self!r}: {listed} each last for the rest of the run; give all but one a length."
            )
        if end is None and run.steps is not None:
            end = Fraction(run.steps)
        known = sum((length for length in lengths if length is not None), Fraction(0))
        if end is not None and known > end - start:
            raise ScheduleError(
                f"{self!r} is longer than the run: its phases take {steps_text(known)}, "
                f"but there are {steps_text(end - start)}. Shorten a phase or lengthen the run."
            )
        if open_ends and end is not None:
            lengths[open_ends[0]] = end - start - known
        elif open_ends and open_ends[0] != len(lengths) - 1:
            raise ScheduleError(
                f"{self!r}: {self.phases[open_ends[0]]!r} lasts for the rest of the run, but the "
                "length of the run is unknown; pass steps= (or epochs= with steps_per_epoch=)."
            )
        return lengths

    @cached_property
    def _ends(self) -> tuple[float, ...]:
        """The step at which each phase ends, once bound; the last phase is held for ever."""
        lengths = [phase.duration(Run()) for phase in self.phases[:-1]]
        return (*accumulate(math.inf if n is None else float(n) for n in lengths), math.inf)

    def at(self, steps: Floats) -> Floats:
        values = np.empty_like(steps)
        begin = 0.0
        for phase, stop in zip(self.phases, self._ends, strict=True):
            inside = (steps >= begin) & (steps < stop)
            if inside.any():
                values[inside] = phase.at(steps[inside] - begin)
            begin = stop
        return values


@dataclass(frozen=True, repr=False)
class Product(Schedule):
    """The product of two schedules."""

    source_name: ClassVar[str] = "*"
    left: Schedule
    right: Schedule

    def __post_init__(self) -> None:
        joined_kind("*", (self.left, self.right))

    def source_text(self, quote: bool) -> str:
        return " * ".join(spell_part(part, quote) for part in (self.left, self.right))

    @property
    def kind(self) -> str:
        return joined_kind("*", (self.left, self.right))

    def duration(self, run: Run) -> Fraction | None:
        lengths = [self.left.duration(run), self.right.duration(run)]
        known = [length for length in lengths if length is not None]
        return max(known) if len(known) == 2 else None

    def bind(self, run: Run, start: Fraction = Fraction(0), end: Fraction | None = None) -> Self:
        return replace(
            self, left=self.left.bind(run, start, end), right=self.right.bind(run, start, end)
        )

    def at(self, steps: Floats) -> Floats:
        return self.left.at(steps) * self.right.at(steps)


def spell_part(schedule: Schedule, quote: bool) -> str:
    """Return a part of a composition, in brackets where its meaning would change without them."""
    if isinstance(schedule, (Sequence, Product)):
        return f"({schedule.source_text(quote)})"
    return to_source(schedule, quote)


def steps_text(amount: Fraction) -> str:
    """Return an amount of steps for an error."""
    return f"{float(amount):g} steps"


def boundaries(schedule: Schedule, begin: float = 0) -> set[int]:
    """Return the first steps of the phases of a bound schedule, and the step after its end.

    Args:
        schedule: bound to a run.
        begin: the step at which it starts.
    """
    if isinstance(schedule, Product):
        return boundaries(schedule.left, begin) | boundaries(schedule.right, begin)
    found: set[int] = set()
    for phase in phases_of(schedule):
        if phase is not schedule:
            found |= boundaries(phase, begin)
        length = phase.duration(Run())
        if length is None:
            break
        begin += float(length)
        found.add(math.ceil(begin))
    return found


#: a run of at most so many steps is looked at step by step
EXACT = 1 << 22
_STRATA = 1 << 20


def steps_to_check(steps: int, marks: Iterable[int] = ()) -> Floats:
    """Return the steps of a run at which values are checked, in order.

    All of them for runs of up to `EXACT` steps; a longer run would need gigabytes for that. Of it,
    one step out of each of 2^20 equal parts is taken, not evenly, so that a cyclic schedule is not
    always met at the same place of its cycle, and those beside the marks.

    Args:
        steps: the length of the run.
        marks: steps that must not be missed, such as the boundaries of phases.
    """
    if steps <= EXACT:
        return np.arange(steps, dtype=np.float64)
    places = np.arange(_STRATA) + np.random.default_rng(0).random(_STRATA)
    spread = (places * (steps / _STRATA)).astype(np.int64)
    beside = {mark + shift for mark in marks for shift in (-1, 0, 1)} | {0, steps - 1}
    kept = np.array(sorted(step for step in beside if 0 <= step < steps), dtype=np.int64)
    # Both are in order, so that doubles are neighbours and the few are put among the many unsorted.
    spread = spread[np.diff(spread, prepend=-1) > 0]
    before = np.searchsorted(spread, kept)
    new = spread[np.minimum(before, len(spread) - 1)] != kept
    return np.insert(spread, before[new], kept[new]).astype(np.float64)
