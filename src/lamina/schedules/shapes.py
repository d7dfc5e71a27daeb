"""Constant, and the smooth ways down: lines, cosines, powers, exponentials."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import ScheduleError
from .base import EITHER, Floats
from .duration import TimeLike
from .shape import Shape, check_numbers, check_positive, half_wave, progress


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

    needs_length: ClassVar[bool] = False
    value: float = 1.0
    length: TimeLike | None = None

    def __post_init__(self) -> None:
        if self.value is None:
            raise ScheduleError("constant was given None; expected a number.")
        check_numbers(self, value=self.value)
        super().__post_init__()

    @property
    def kind(self) -> str:
        return EITHER

    def shape(self, t: Floats, length: float) -> Floats:
        return np.full_like(t, self.value)


@dataclass(frozen=True, repr=False)
class Between(Shape):
    """What several schedules share: the numbers at both ends."""

    start: float | None = None
    to: float = 0.0
    length: TimeLike | None = None

    def __post_init__(self) -> None:
        check_numbers(self, start=self.start, to=self.to)
        super().__post_init__()


@dataclass(frozen=True, repr=False)
class Linear(Between):
    """A straight line: `linear(0.04, 0.4)` is a value, `linear(to=0.1)` a factor from 1.

    Formula: `start + (to - start) * t / length`.

    Args:
        start: the number at its first step; with it the schedule is a value, without it a factor
            that starts from 1.
        to: the number at its end: for a value in its own unit (an absolute floor), for a factor
            relative, so that ratios between layers survive.
        length: how long, in any unit of time; the rest of the run by default.

    Example:
        >>> linear(to=0.0, length=100)(50)
        0.5
    """

    def shape(self, t: Floats, length: float) -> Floats:
        return self._first_value + (self.to - self._first_value) * progress(t, length)


@dataclass(frozen=True, repr=False)
class Fall(Between):
    """What several schedules share: from `start` to `to` along a falling curve.

    Formula: `to + (start - to) * fall(t / length)`.
    """

    def shape(self, t: Floats, length: float) -> Floats:
        return self.to + (self._first_value - self.to) * self.fall(progress(t, length))

    @abstractmethod
    def fall(self, share: Floats) -> Floats:
        """Return the fall from 1 at share 0 to 0 at share 1."""


@dataclass(frozen=True, repr=False)
class Cosine(Fall):
    """Half a cosine wave down (or up): `cosine(to=0.01)` is a factor from 1.

    Formula: `to + (start - to) * (1 + cos(pi * t / length)) / 2`.

    Args:
        start: the number at its first step; with it the schedule is a value, without it a factor
            that starts from 1.
        to: the number at its end: for a value in its own unit (an absolute floor), for a factor
            relative, so that ratios between layers survive.
        length: how long, in any unit of time; the rest of the run by default.

    Example:
        >>> round(cosine(to=0.0, length=100)(50), 12)
        0.5

    References:
        Loshchilov and Hutter, SGDR (2017), equation 5.
    """

    def fall(self, share: Floats) -> Floats:
        return half_wave(share)


@dataclass(frozen=True, repr=False)
class OneMinusSqrt(Fall):
    """One minus the square root of time: the fast early cooldown of warmup-stable-decay.

    Formula: `to + (start - to) * (1 - sqrt(t / length))`.

    Args:
        start: the number at its first step; with it the schedule is a value, without it a factor
            that starts from 1.
        to: the number at its end: for a value in its own unit (an absolute floor), for a factor
            relative, so that ratios between layers survive.
        length: how long, in any unit of time; the rest of the run by default.

    Example:
        >>> one_minus_sqrt(length=100)(25)
        0.5

    References:
        Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations
        (2024), equation 1.
    """

    def fall(self, share: Floats) -> Floats:
        return 1.0 - np.sqrt(share)


@dataclass(frozen=True, repr=False)
class Polynomial(Shape):
    """A power of the time that remains; power 1 is a straight line.

    Formula: `to + (start - to) * (1 - t / length) ** power`.

    Args:
        power: the exponent, above 0.
        start: the number at its first step; with it the schedule is a value, without it a factor
            that starts from 1.
        to: the number at its end: for a value in its own unit (an absolute floor), for a factor
            relative, so that ratios between layers survive.
        length: how long, in any unit of time; the rest of the run by default.

    Example:
        >>> polynomial(2.0, length=100)(50)
        0.25
    """

    power: float = 1.0
    start: float | None = None
    to: float = 0.0
    length: TimeLike | None = None

    def __post_init__(self) -> None:
        check_numbers(self, power=self.power, start=self.start, to=self.to)
        check_positive(self, power=self.power)
        super().__post_init__()

    def shape(self, t: Floats, length: float) -> Floats:
        return self.to + (self._first_value - self.to) * (1.0 - progress(t, length)) ** self.power


@dataclass(frozen=True, repr=False)
class Exponential(Shape):
    """Continuous decay by a factor in every period; `step_decay(...)` does the same in jumps.

    Formula: `start * gamma ** (t / every)`, with start 1 for a factor.

    Args:
        gamma: the factor of each period.
        every: the period, in any unit of time.
        start: with it the schedule is a value, without it a factor that starts from 1.
        length: how long in all; the rest of the run by default.

    Example:
        >>> exponential(0.25, every=100)(50)
        0.5
    """

    needs_length: ClassVar[bool] = False
    spans: ClassVar[tuple[str, ...]] = ("every",)
    gamma: float
    every: TimeLike = 1
    start: float | None = None
    length: TimeLike | None = None

    def __post_init__(self) -> None:
        check_numbers(self, gamma=self.gamma, start=self.start)
        super().__post_init__()
        check_positive(self, every=self.every)

    def shape(self, t: Floats, length: float) -> Floats:
        return self._first_value * self.gamma ** (t / float(self.span("every")))
