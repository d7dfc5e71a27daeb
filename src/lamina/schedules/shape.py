"""`Shape`: a schedule with one formula, the base of the built-in ones and of a user's own."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from typing import Any, ClassVar, Self

import numpy as np

from .._util.numbers import is_number, is_whole
from ..errors import ScheduleError
from . import duration as time
from .base import FACTOR, VALUE, Floats, Schedule, steps_text
from .duration import Run


@dataclass(frozen=True, repr=False)
class Shape(Schedule):
    """A schedule with one formula; a schedule of one's own subclasses it and gives `shape`.

    A subclass is a frozen dataclass; its fields are the arguments of its constructor. Two names
    have a meaning: a field `length` is the length of the schedule (without the field it lasts for
    the rest of the run, and is not told how long that is); a field `start` that is not None makes
    it a value. Other times among the fields are listed in `spans` and read with `self.span(name)`.

    Example:
        >>> class Saw(Shape):
        ...     def shape(self, t, length):
        ...         return 1.0 - (t % 100) / 200
        >>> Saw()(50)
        0.75
    """

    #: whether the formula needs to know its length
    needs_length: ClassVar[bool] = True
    #: the names of fields, beside `length`, that are times
    spans: ClassVar[tuple[str, ...]] = ()
    #: those times in exact steps of the run, set by `bind`
    exact: tuple[Fraction, ...] | None = field(default=None, repr=False, kw_only=True, compare=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "source_name" not in vars(cls):
            cls.source_name = cls.__name__

    def __post_init__(self) -> None:
        for name in (*self.spans, "length"):
            value = getattr(self, name, None)
            if value is not None:
                object.__setattr__(self, name, time.parse(value).text)

    @property
    def kind(self) -> str:
        return FACTOR if getattr(self, "start", None) is None else VALUE

    @property
    def _first_value(self) -> float:
        """The field `start`, or 1 for a factor."""
        start: float | None = getattr(self, "start", None)
        return 1.0 if start is None else start

    def duration(self, run: Run) -> Fraction | None:
        length = getattr(self, "length", None)
        return None if length is None else time.parse(length).in_steps(run)

    def span(self, name: str) -> Fraction:
        """Return a time among the fields, in exact steps."""
        if self.exact is not None:
            return self.exact[self.spans.index(name)]
        return time.parse(getattr(self, name)).in_steps(Run())

    def settle(self, run: Run, start: Fraction) -> tuple[Fraction, ...]:
        """Return the times in `spans` in exact steps of a run; 0 for those that are not given."""
        given = [getattr(self, name) for name in self.spans]
        return tuple(Fraction(0) if v is None else time.parse(v).in_steps(run) for v in given)

    def bind(self, run: Run, start: Fraction = Fraction(0), end: Fraction | None = None) -> Self:
        bound = self
        if self.spans and self.exact is None:
            bound = replace(bound, exact=self.settle(run, start))
        if not any(item.name == "length" for item in fields(self)):
            return bound
        if end is None and run.steps is not None:
            end = Fraction(run.steps)
        own = self.duration(run)
        if own is not None:
            if end is not None and own > end - start:
                raise ScheduleError(
                    f"{self!r} lasts {steps_text(own)}, but there are only "
                    f"{steps_text(end - start)}. Shorten it or lengthen the run."
                )
            end = start + own
        if end is None:
            if self.needs_length:
                raise ScheduleError(
                    f"{self!r} lasts for the rest of the run, but the length of the run is "
                    "unknown; pass steps= (or epochs= with steps_per_epoch=), or give it length=."
                )
            return bound
        # As a dict: `Shape` itself has no field of that name, only its subclasses have.
        changed: dict[str, Any] = {"length": math.ceil(end) - math.ceil(start)}
        return replace(bound, **changed)

    def at(self, steps: Floats) -> Floats:
        length = getattr(self, "length", None)
        if length is None:
            return self.shape(steps, math.inf)
        values = self.shape(np.minimum(steps, length), float(length))
        past = steps >= length
        if past.any():
            values = np.where(past, self.end(float(length)), values)
        return values

    @abstractmethod
    def shape(self, t: Floats, length: float) -> Floats:
        """Return the formula, for an array of 0 <= t <= length (steps since the schedule began)."""

    def end(self, length: float) -> float:
        """Return the left limit at the end, which is held; override where the formula jumps."""
        return float(self.shape(np.array([length]), length)[0])


class Jumping(Shape):
    """A shape made of jumps: its left limit at the end is the value of the last step."""

    def end(self, length: float) -> float:
        return float(self.shape(np.array([max(math.ceil(length) - 1.0, 0.0)]), length)[0])


def progress(t: Floats, length: float) -> Floats:
    """Return t / length, from 0 to 1; a phase without length is over at once."""
    return t / length if length > 0 else np.ones_like(t)


def half_wave(share: Floats) -> Floats:
    """Return half a cosine, from 1 at share 0 down to 0 at share 1."""
    return (1.0 + np.cos(np.pi * share)) / 2.0


def check_numbers(schedule: Schedule, **numbers: object) -> None:
    """Raise `ScheduleError` unless every number given (or None) is finite and not negative."""
    for name, number in numbers.items():
        if number is None:
            continue
        if not is_number(number):
            hint = ""
            if isinstance(number, str):
                hint = f" A length of time is given by name: length={number!r}."
            raise ScheduleError(
                f"{schedule.source_name} was given {name}={number!r}; expected a number.{hint}"
            )
        if not 0 <= number < math.inf:
            raise ScheduleError(
                f"{schedule.source_name} was given {name}={number!r}; "
                "expected a finite number of at least 0."
            )


def check_positive(schedule: Schedule, **times_or_numbers: object) -> None:
    """Raise `ScheduleError` for a period or a number of 0."""
    for name, given in times_or_numbers.items():
        amount = time.parse(given).amount if isinstance(given, str) else given
        if amount == 0:
            raise ScheduleError(
                f"{schedule.source_name} was given {name}={given!r}; expected more than 0."
            )


def check_choice(schedule: Schedule, name: str, given: object, choices: tuple[str, ...]) -> None:
    """Raise `ScheduleError` unless a word is one of those that there are."""
    if given not in choices:
        raise ScheduleError(
            f"{schedule.source_name} was given {name}={given!r}; expected one of "
            f"{', '.join(map(repr, choices))}."
        )


def check_count(schedule: Schedule, **numbers: object) -> None:
    """Raise `ScheduleError` unless every number given (or None) is a whole number above 0."""
    for name, number in numbers.items():
        if number is None:
            continue
        if not is_whole(number) or number < 1:
            raise ScheduleError(
                f"{schedule.source_name} was given {name}={number!r}; expected a whole number "
                "above 0."
            )
