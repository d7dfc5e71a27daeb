"""Schedules made of other schedules: repeat, warmup-stable-decay."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Self

import numpy as np

from ..errors import ScheduleError
from . import duration as time
from .base import FACTOR, Floats, Schedule, steps_text
from .duration import Run, TimeLike
from .shape import check_count, check_positive
from .shapes import Constant, Linear
from .warm import Warmup


@dataclass(frozen=True, repr=False)
class Repeat(Schedule):
    """A schedule again and again, each time from its beginning.

    Formula: `schedule(t - begin of its repetition)`; each begins at the first whole step at or
    after `n * period`.

    Args:
        schedule: what to repeat.
        times: how often; if its length and `period` are open, it is fitted so often into the
            rest of the run. As often as it takes by default.
        period: the time from one beginning to the next; the length of the schedule by default.

    Example:
        >>> repeat(linear(to=0.0, length=100), times=3)(250)
        0.5
    """

    schedule: Schedule
    times: int | None = None
    period: TimeLike | None = None
    #: the exact period, and the whole steps in all, set by `bind`
    exact: Fraction | None = field(default=None, repr=False, kw_only=True)
    length: int | None = field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise ScheduleError(f"repeat was given {self.schedule!r}; expected a schedule.")
        check_count(self, times=self.times)
        if self.period is not None:
            object.__setattr__(self, "period", time.parse(self.period).text)
        check_positive(self, period=self.period)

    @property
    def kind(self) -> str:
        return self.schedule.kind

    def _period(self, run: Run) -> Fraction | None:
        if self.period is not None:
            return time.parse(self.period).in_steps(run)
        return self.schedule.duration(run)

    def duration(self, run: Run) -> Fraction | None:
        if self.exact is not None:
            return None if self.length is None else Fraction(self.length)
        period = self._period(run)
        return None if period is None or self.times is None else period * self.times

    def bind(self, run: Run, start: Fraction = Fraction(0), end: Fraction | None = None) -> Self:
        if self.exact is not None:
            return self
        if end is None and run.steps is not None:
            end = Fraction(run.steps)
        room = None if end is None else end - start
        period = self._period(run)
        if period is None and self.times is not None and room is not None:
            period = room / self.times
        if not period:
            raise ScheduleError(
                f"{self!r} has no period; give period=, or a schedule with a length"
                f"{' above 0' if period == 0 else ', or times= and the length of the run'}."
            )
        whole = room if self.times is None else period * self.times
        if room is not None and whole is not None and whole > room:
            raise ScheduleError(
                f"{self!r} lasts {steps_text(whole)}, but there are only {steps_text(room)}. "
                "Shorten it or lengthen the run."
            )
        return replace(
            self,
            schedule=self.schedule.bind(run, Fraction(0), period),
            exact=period,
            length=None if whole is None else math.ceil(start + whole) - math.ceil(start),
        )

    def at(self, steps: Floats) -> Floats:
        assert self.exact is not None
        top, bottom = self.exact.numerator, self.exact.denominator
        last = steps if self.length is None else np.minimum(steps, max(self.length - 1, 0))
        count = np.floor(last * bottom / top)
        if self.length is not None:  # past the end the last repetition goes on to its own end
            steps = np.minimum(steps, self.length)
        return self.schedule.at(steps - np.ceil(count * top / bottom))


def wsd(warmup: TimeLike, decay: TimeLike | Schedule, to: float = 0.0) -> Schedule:
    """Build warmup, stable, decay: `warmup(...) >> constant() >> linear(to=..., length=...)`.

    Args:
        warmup: the length of the warmup, in any unit of time.
        decay: the length of the decay; or the decay itself, a factor with a length, such as
            `one_minus_sqrt(length="20%")`.
        to: the factor at the end of a straight decay.

    Returns:
        The composition, which prints as such.

    Example:
        >>> wsd(100, "20%")
        warmup(100) >> constant() >> linear(length='20%')

    References:
        Hu et al., MiniCPM (2024), section 4.
    """
    if isinstance(decay, Schedule):
        if to != 0.0:
            raise ScheduleError(f"wsd was given to={to!r} and {decay!r}; write to= in the decay.")
        if decay.kind != FACTOR or getattr(decay, "length", 0) is None:
            raise ScheduleError(
                f"wsd was given decay={decay!r}; expected a length of time, or a factor with one."
            )
        return Warmup(warmup) >> Constant() >> decay
    return Warmup(warmup) >> Constant() >> Linear(to=to, length=decay)
