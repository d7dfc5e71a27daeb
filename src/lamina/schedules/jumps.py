"""Schedules given by points in time: step decay, milestones, tables."""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import ClassVar

import numpy as np

from ..errors import ScheduleError
from . import duration as time
from .base import EITHER, Floats
from .duration import Run, TimeLike
from .shape import Jumping, Shape, check_numbers, check_positive


@dataclass(frozen=True, repr=False)
class StepDecay(Jumping):
    """Lower by a factor after every period (step decay).

    Formula: `start * gamma ** floor(t / every)`, with start 1 for a factor.

    Args:
        every: the period, in any unit of time.
        gamma: the factor of each period.
        start: with it the schedule is a value, without it a factor that starts from 1.
        length: how long in all; the rest of the run by default.

    Example:
        >>> step_decay(every=30, gamma=0.1)(59)
        0.1
    """

    needs_length: ClassVar[bool] = False
    spans: ClassVar[tuple[str, ...]] = ("every",)
    every: TimeLike
    gamma: float = 0.1
    start: float | None = None
    length: TimeLike | None = None

    def __post_init__(self) -> None:
        check_numbers(self, gamma=self.gamma, start=self.start)
        super().__post_init__()
        check_positive(self, every=self.every)

    def shape(self, t: Floats, length: float) -> Floats:
        period = self.span("every")
        # A period of p/q steps changes at ceil(n * p / q), all in whole numbers below 2**53.
        return self._first_value * self.gamma ** np.floor(t * period.denominator / period.numerator)


@dataclass(frozen=True, repr=False)
class MultiStep(Jumping):
    """Lower by a factor at every milestone.

    Formula: `start * gamma ** (how many milestones <= t)`, with start 1 for a factor.

    Args:
        milestones: times since the schedule began, in any units; one given twice counts twice.
        gamma: the factor of each milestone.
        start: with it the schedule is a value, without it a factor that starts from 1.
        length: how long in all; the rest of the run by default.

    Example:
        >>> multi_step([30, 80], gamma=0.5)(80)
        0.25
    """

    needs_length: ClassVar[bool] = False
    spans: ClassVar[tuple[str, ...]] = ("milestones",)
    milestones: Many[TimeLike]
    gamma: float = 0.1
    start: float | None = None
    length: TimeLike | None = None

    def __post_init__(self) -> None:
        check_numbers(self, gamma=self.gamma, start=self.start)
        if isinstance(self.milestones, str) or not isinstance(self.milestones, Many):
            raise ScheduleError(
                f"multi_step was given milestones={self.milestones!r}; expected a list of times."
            )
        texts = tuple(time.parse(milestone).text for milestone in self.milestones)
        object.__setattr__(self, "milestones", texts)
        if self.length is not None:
            object.__setattr__(self, "length", time.parse(self.length).text)

    def settle(self, run: Run, start: Fraction) -> tuple[Fraction, ...]:
        return tuple(sorted(whole(item, run, start) for item in self.milestones))

    def shape(self, t: Floats, length: float) -> Floats:
        places = self.settle(Run(), Fraction(0)) if self.exact is None else self.exact
        passed = np.searchsorted([float(place) for place in places], t, side="right")
        return self._first_value * self.gamma ** passed.astype(np.float64)


@dataclass(frozen=True, repr=False)
class Piecewise(Jumping):
    """Numbers at points in time; as factors or as values, depending on where it stands.

    Formula: the straight line between neighbouring points, or the number of the last point
    reached; the first number before the first point, the last one after the last.

    Args:
        points: pairs (time since the schedule began, number), in increasing time.
        held: True to jump at each point, False for straight lines.
        length: how long in all; the rest of the run by default.

    Example:
        >>> piecewise([(0, 1.0), (100, 0.5)])(50)
        0.75
    """

    needs_length: ClassVar[bool] = False
    spans: ClassVar[tuple[str, ...]] = ("points",)
    points: Many[tuple[TimeLike, float]]
    held: bool = False
    length: TimeLike | None = None

    def __post_init__(self) -> None:
        pairs = self.points if isinstance(self.points, Many) else ()
        if not pairs or not all(_is_pair(pair) for pair in pairs):
            raise ScheduleError(
                f"table was given points={self.points!r}; expected at least one pair of a time "
                "and a number, such as piecewise([(0, 1.0), ('50%', 0.1)])."
            )
        for index, (_, number) in enumerate(pairs):
            check_numbers(self, **{f"points[{index}]": number})
        texts = tuple((time.parse(place).text, number) for place, number in pairs)
        object.__setattr__(self, "points", texts)
        if self.length is not None:
            object.__setattr__(self, "length", time.parse(self.length).text)

    @property
    def kind(self) -> str:
        return EITHER

    def settle(self, run: Run, start: Fraction) -> tuple[Fraction, ...]:
        places = tuple(whole(place, run, start) for place, _ in self.points)
        if any(late <= early for early, late in pairwise(places)):
            listed = ", ".join(str(int(place)) for place in places)
            raise ScheduleError(
                f"{self!r} has its points at steps {listed}; expected each later than the last."
            )
        return places

    def shape(self, t: Floats, length: float) -> Floats:
        exact = self.settle(Run(), Fraction(0)) if self.exact is None else self.exact
        places = np.array([float(place) for place in exact])
        numbers = np.array([number for _, number in self.points], dtype=np.float64)
        if not self.held:
            return np.asarray(np.interp(t, places, numbers), dtype=np.float64)
        reached = np.searchsorted(places, t, side="right") - 1
        return numbers[np.maximum(reached, 0)]

    def end(self, length: float) -> float:
        return super().end(length) if self.held else Shape.end(self, length)


def whole(place: TimeLike, run: Run, start: Fraction) -> Fraction:
    """Return a time since `start` in whole steps since `start` rounded up."""
    return Fraction(math.ceil(start + time.parse(place).in_steps(run)) - math.ceil(start))


def _is_pair(pair: object) -> bool:
    return isinstance(pair, (tuple, list)) and len(pair) == 2
