"""Schedules that come back: cyclic, and cosines with warm restarts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from ..errors import ScheduleError
from .base import FACTOR, VALUE, Floats
from .duration import TimeLike
from .shape import Shape, check_choice, check_count, check_numbers, check_positive, half_wave

_MODES = ("triangular", "triangular2", "exp_range")


@dataclass(frozen=True, repr=False)
class Cyclic(Shape):
    """Straight lines up and down, again and again; as a factor the peak is each group's own lr.

    Formula: `base + (peak - base) * triangle(t) * scale`, where the triangle goes from 0 to 1 in
    `up` and back in `down`; scale is 1 (`triangular`), `2 ** -cycle` (`triangular2`, cycles
    counted from 0) or `gamma ** t` (`exp_range`).

    Args:
        up: the time from the base to the peak.
        base: where each cycle begins and ends.
        down: the time back; `up` by default.
        peak: with it the schedule is a value; without it a factor with a peak of 1. For a
            momentum that mirrors the learning rate it is below `base`.
        mode: "triangular", "triangular2" or "exp_range".
        gamma: the factor of each step in the mode exp_range.
        length: how long in all; the rest of the run by default.

    Example:
        >>> cyclic(up=100, base=0.25)(100)
        1.0

    References:
        Smith, Cyclical Learning Rates for Training Neural Networks (2017).
    """

    needs_length: ClassVar[bool] = False
    spans: ClassVar[tuple[str, ...]] = ("up", "down")
    up: TimeLike
    base: float
    down: TimeLike | None = None
    peak: float | None = None
    mode: str = "triangular"
    gamma: float = 1.0
    length: TimeLike | None = None

    def __post_init__(self) -> None:
        check_numbers(self, base=self.base, peak=self.peak, gamma=self.gamma)
        check_choice(self, "mode", self.mode, _MODES)
        super().__post_init__()
        check_positive(self, up=self.up, down=self.down)

    @property
    def kind(self) -> str:
        return FACTOR if self.peak is None else VALUE

    def shape(self, t: Floats, length: float) -> Floats:
        up = self.span("up")
        down = up if self.down is None else self.span("down")
        period = up + down
        place = np.mod(t * period.denominator, period.numerator) / period.denominator
        rising = place <= float(up)
        height = np.where(rising, place / float(up), (float(period) - place) / float(down))
        if self.mode == "triangular2":
            height = height * 0.5 ** np.floor(t * period.denominator / period.numerator)
        elif self.mode == "exp_range":
            height = height * self.gamma**t
        peak = 1.0 if self.peak is None else self.peak
        return self.base + (peak - self.base) * height


@dataclass(frozen=True, repr=False)
class WarmRestarts(Shape):
    """Cosines one after the other, each from its peak down; give `first` or `cycles`.

    Formula: `to + (start - to) * decay ** i * (1 + cos(pi * share)) / 2` in cycle i, which lasts
    `first * mult ** i`; share is the part of the cycle that is over.

    Args:
        first: the length of the first cycle, in any unit of time.
        cycles: how many cycles fill the length, instead of `first`.
        mult: each cycle is so many times as long as the one before, at least 1.
        decay: each peak is this part of the one before.
        start: with it the schedule is a value, without it a factor that starts from 1.
        to: the number at the end of each cycle: for a value in its own unit (an absolute floor),
            for a factor relative, so that ratios between layers survive.
        length: how long in all; the rest of the run by default.

    Example:
        >>> warm_restarts(first=100, decay=0.5)(100)
        0.5

    References:
        Loshchilov and Hutter, SGDR (2017), equation 5.
    """

    needs_length: ClassVar[bool] = False
    spans: ClassVar[tuple[str, ...]] = ("first",)
    first: TimeLike | None = None
    cycles: int | None = None
    mult: float = 1
    decay: float = 1.0
    start: float | None = None
    to: float = 0.0
    length: TimeLike | None = None

    def __post_init__(self) -> None:
        check_numbers(self, mult=self.mult, decay=self.decay, start=self.start, to=self.to)
        check_count(self, cycles=self.cycles)
        if (self.first is None) == (self.cycles is None):
            raise ScheduleError(
                f"warm_restarts was given first={self.first!r} and cycles={self.cycles!r}; "
                "expected one of them: the length of the first cycle, or how many there are."
            )
        if self.mult < 1:
            raise ScheduleError(f"warm_restarts was given mult={self.mult!r}; expected 1 or more.")
        super().__post_init__()
        check_positive(self, first=self.first)

    def _first(self, length: float) -> Fraction:
        """Return the exact length of the first cycle."""
        if self.cycles is None:
            return self.span("first")
        if not math.isfinite(length):
            raise ScheduleError(
                f"{self!r} fills its length with {self.cycles} cycles, but the length of the run "
                "is unknown; pass steps= (or epochs= with steps_per_epoch=), or give it length=."
            )
        mult = Fraction(str(self.mult))
        return Fraction(length) / sum((mult**i for i in range(self.cycles)), Fraction(0))

    def _place(self, t: Floats, first: Fraction) -> tuple[Floats, Floats]:
        """Return the number of the cycle, and the share of it that is over."""
        if self.mult == 1:
            whole = t * first.denominator
            return np.floor(whole / first.numerator), np.mod(whole, first.numerator) / float(
                first.numerator
            )
        begins, size, last = [Fraction(0)], first, float(t.max(initial=0.0))
        while begins[-1] <= last:
            begins.append(begins[-1] + size)
            size *= Fraction(str(self.mult))
        edges = np.array([float(begin) for begin in begins])
        cycle = np.searchsorted(edges, t, side="right") - 1
        cycle = np.minimum(cycle, len(edges) - 2)
        share = (t - edges[cycle]) / (edges[cycle + 1] - edges[cycle])
        return cycle.astype(np.float64), share

    def shape(self, t: Floats, length: float) -> Floats:
        cycle, share = self._place(t, self._first(length))
        return self._height(cycle, share)

    def _height(self, cycle: Floats, share: Floats) -> Floats:
        return self.to + (self._first_value - self.to) * self.decay**cycle * half_wave(share)

    def end(self, length: float) -> float:
        if length == 0:
            return self.to
        cycle, share = self._place(np.array([length]), self._first(length))
        if share[0] == 0:  # a new cycle would begin here: hold the end of the last
            cycle, share = cycle - 1.0, np.ones(1)
        return float(self._height(cycle, share)[0])
