"""The simple schedules: constant, linear, cosine, warmup, steps, and any function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Self

import numpy as np

from .. import time
from ..errors import ScheduleError
from ..time import Run, TimeLike
from .base import EITHER, FACTOR, VALUE, Floats, Shape, progress


def check_finite(schedule: object, **numbers: float | None) -> None:
    """Raise `ScheduleError` unless every number given is finite and not negative."""
    for name, number in numbers.items():
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            hint = ""
            if isinstance(number, str):
                hint = f" A length of time is given by name: length={number!r}."
            raise ScheduleError(
                f"{type(schedule).__name__.lower()} was given {name}={number!r}; "
                f"expected a number.{hint}"
            )
        if not 0 <= number < math.inf:
            raise ScheduleError(
                f"{type(schedule).__name__.lower()} was given {name}={number!r}; "
                "expected a finite number of at least 0."
            )


@dataclass(frozen=True, repr=False)
class Constant(Shape):
    """The same number all the time; as a factor or as a value, depending on where it stands.

    Formula: `value`.

    Args:
        value: the number.
        length: how long, in any unit of time; the rest of the run by default.

    Example:
        >>> constant(0.5)(10)
        0.5
    """

    spelling: ClassVar[str] = "constant"
    needs_length: ClassVar[bool] = False
    value: float = 1.0
    length: TimeLike | None = None

    def __post_init__(self) -> None:
        check_finite(self, value=self.value)
        self.check_length()

    @property
    def kind(self) -> str:
        return EITHER

    def shape(self, t: Floats, length: float) -> Floats:
        return np.full_like(t, self.value)


@dataclass(frozen=True, repr=False)
class Linear(Shape):
    """A straight line: `linear(0.04, 0.4)` is a value, `linear(to=0.1)` a factor from 1.

    Formula: `start + (to - start) * t / length`.

    Args:
        start: the number at its first step; with it the schedule is a value, without it a factor
            that starts from 1.
        to: the number at its end (for a factor: relative, so ratios between layers survive).
        length: how long, in any unit of time; the rest of the run by default.

    Example:
        >>> linear(to=0.0, length=100)(50)
        0.5
    """

    spelling: ClassVar[str] = "linear"
    start: float | None = None
    to: float = 0.0
    length: TimeLike | None = None

    def __post_init__(self) -> None:
        check_finite(self, start=self.start, to=self.to)
        self.check_length()

    def shape(self, t: Floats, length: float) -> Floats:
        start = 1.0 if self.start is None else self.start
        return start + (self.to - start) * progress(t, length)


@dataclass(frozen=True, repr=False)
class Cosine(Shape):
    """Half a cosine wave down (or up): `cosine(to=0.01)` is a factor from 1.

    Formula: `to + (start - to) * (1 + cos(pi * t / length)) / 2`.

    Args:
        start: the number at its first step; with it the schedule is a value, without it a factor
            that starts from 1.
        to: the number at its end (for a factor: relative, so ratios between layers survive).
        length: how long, in any unit of time; the rest of the run by default.

    Example:
        >>> round(cosine(to=0.0, length=100)(50), 12)
        0.5

    Source: Loshchilov and Hutter, SGDR (2017), equation 5.
    """

    spelling: ClassVar[str] = "cosine"
    start: float | None = None
    to: float = 0.0
    length: TimeLike | None = None

    def __post_init__(self) -> None:
        check_finite(self, start=self.start, to=self.to)
        self.check_length()

    def shape(self, t: Floats, length: float) -> Floats:
        start = 1.0 if self.start is None else self.start
        wave = (1.0 + np.cos(np.pi * progress(t, length))) / 2.0
        return self.to + (start - self.to) * wave


@dataclass(frozen=True, repr=False)
class Warmup(Shape):
    """A straight line up to 1, for the beginning of a run.

    Formula: `start + (1 - start) * t / length`; the first step has `start`, as in Transformers.

    Args:
        length: how long, in any unit of time.
        start: the factor at its first step.

    Example:
        >>> warmup(500)(250)
        0.5
    """

    spelling: ClassVar[str] = "warmup"
    length: TimeLike
    start: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self, start=self.start)
        if self.length is None:
            raise ScheduleError("warmup needs a length, such as warmup(500) or warmup('6%').")
        self.check_length()

    @property
    def kind(self) -> str:
        return FACTOR

    def shape(self, t: Floats, length: float) -> Floats:
        return self.start + (1.0 - self.start) * progress(t, length)


@dataclass(frozen=True, repr=False)
class Steps(Shape):
    """Lower by a factor after every period (step decay).

    Formula: `start * gamma ** floor(t / every)`, with start 1 for a factor.

    Args:
        every: the period, in any unit of time.
        gamma: the factor of each period.
        start: with it the schedule is a value, without it a factor that starts from 1.
        length: how long in all; the rest of the run by default.

    Example:
        >>> steps(every=30, gamma=0.1)(59)
        0.1
    """

    spelling: ClassVar[str] = "steps"
    needs_length: ClassVar[bool] = False
    every: TimeLike
    gamma: float = 0.1
    start: float | None = None
    length: TimeLike | None = None
    #: how far `every` ends after a whole step, set by `bind`
    period: Fraction | None = field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        check_finite(self, gamma=self.gamma, start=self.start)
        object.__setattr__(self, "every", time.parse(self.every).text)
        if time.parse(self.every).amount == 0:
            raise ScheduleError("steps was given every=0; expected a period above 0.")
        self.check_length()

    def bind(self, run: Run, start: Fraction = Fraction(0), end: Fraction | None = None) -> Self:
        bound = super().bind(run, start, end)
        if bound.period is None:
            object.__setattr__(bound, "period", time.parse(self.every).in_steps(run))
        return bound

    def _count(self, t: Floats) -> Floats:
        period = self.period if self.period is not None else time.parse(self.every).in_steps(Run())
        # A period of p/q steps changes at ceil(n * p / q), all in whole numbers below 2**53.
        return np.floor(t * period.denominator / period.numerator)

    def shape(self, t: Floats, length: float) -> Floats:
        start = 1.0 if self.start is None else self.start
        return start * self.gamma ** self._count(t)

    def end(self, length: float) -> float:
        return float(self.shape(np.array([max(length - 1.0, 0.0)]), length)[0])


@dataclass(frozen=True, repr=False)
class Function(Shape):
    """Any function of the step, as a factor or as a value, depending on where it stands.

    Formula: `f(t)`, with t counted from the first step of this phase.

    Args:
        f: takes a step and gives a number; tried on an array of steps, else called step by step.
        length: how long, in any unit of time; the rest of the run by default.

    Example:
        >>> function(lambda t: 0.95**t)(0)
        1.0
    """

    spelling: ClassVar[str] = "function"
    needs_length: ClassVar[bool] = False
    f: Callable[[Any], Any]
    length: TimeLike | None = None

    def __post_init__(self) -> None:
        if not callable(self.f):
            raise ScheduleError(f"function was given {self.f!r}; expected a function of the step.")
        self.check_length()

    def spelled(self, quote: bool) -> str:
        name = getattr(self.f, "__qualname__", repr(self.f))
        return f"function({name}{'' if self.length is None else f', length={self.length!r}'})"

    @property
    def kind(self) -> str:
        return EITHER

    def shape(self, t: Floats, length: float) -> Floats:
        if self._takes_arrays():
            return np.asarray(self.f(t), dtype=np.float64)
        return np.array([self._number(int(step)) for step in t], dtype=np.float64)

    def _number(self, step: int) -> float:
        try:
            return float(self.f(step))
        except Exception as error:
            raise ScheduleError(
                f"{self!r} failed at step {step}: {type(error).__name__}: {error}."
            ) from error

    def _takes_arrays(self) -> bool:
        """Whether f maps arrays element by element; probed on two steps, the same each time."""
        probe = np.array([0.0, 1.0])
        try:
            with np.errstate(all="ignore"):
                got = np.asarray(self.f(probe), dtype=np.float64)
            return got.shape == (2,) and np.allclose(
                got, [self.f(0), self.f(1)], rtol=1e-9, atol=0, equal_nan=True
            )
        except Exception:  # noqa: BLE001 - whatever it raises, it does not take arrays
            return False


__all__ = ["VALUE", "Constant", "Cosine", "Function", "Linear", "Steps", "Warmup"]
