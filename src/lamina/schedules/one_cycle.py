"""One cycle, and the momentum that belongs to it."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np

from ..errors import ScheduleError
from .base import VALUE, Floats
from .duration import TimeLike
from .shape import Shape, check_choice, check_numbers, check_positive, half_wave

_WAVES = ("cos", "linear")


def through(t: Floats, turns: Many[float], levels: Many[float], wave: str) -> Floats:
    """Return a curve through `levels[i]` at `turns[i]`, along half cosines or straight lines."""
    values = np.full_like(t, levels[-1])
    for i in range(len(turns) - 1):
        begin, end = turns[i], turns[i + 1]
        inside = (t >= begin) & (t < end)
        share = (t[inside] - begin) / ((end - begin) or 1.0)
        left = half_wave(share) if wave == "cos" else 1.0 - share
        values[inside] = levels[i + 1] + (levels[i] - levels[i + 1]) * left
    return values


@dataclass(frozen=True, repr=False)
class OneCycle(Shape):
    """Up to the peak and far down again, once; the peak is each group's own lr.

    Formula: a half cosine (or a line) from `1 / div_factor` up to 1 at `pct_start * length`, then
    down to `1 / (div_factor * final_div_factor)` at the end; with `three_phase` back to
    `1 / div_factor` at `2 * pct_start * length` first.

    Args:
        pct_start: the share of the length that goes up, 0 to 1 (at most 0.5 with three phases).
        div_factor: the peak over the first factor.
        final_div_factor: the first factor over the last one.
        anneal_strategy: "cos" or "linear".
        three_phase: whether the way down first mirrors the way up.
        length: how long, in any unit of time; the rest of the run by default.

    Example:
        >>> one_cycle(length=100)(30)
        1.0

    References:
        Smith and Topin, Super-Convergence (2018).
    """

    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    anneal_strategy: str = "cos"
    three_phase: bool = False
    length: TimeLike | None = None

    def __post_init__(self) -> None:
        check_numbers(self, div_factor=self.div_factor, final_div_factor=self.final_div_factor)
        check_positive(self, div_factor=self.div_factor, final_div_factor=self.final_div_factor)
        _check_cycle(self)
        super().__post_init__()

    def shape(self, t: Floats, length: float) -> Floats:
        first = 1.0 / self.div_factor
        levels = [first, 1.0, *([first] if self.three_phase else ()), first / self.final_div_factor]
        return through(t, _turns(self, length), levels, self.anneal_strategy)


@dataclass(frozen=True, repr=False)
class OneCycleMomentum(Shape):
    """The momentum that belongs to `one_cycle`: low while the learning rate is high. A value.

    Formula: from `high` down to `low` at `pct_start * length` and up to `high` again, along half
    cosines (or lines); with `three_phase` it is up again at `2 * pct_start * length`.

    Args:
        low: the momentum at the peak of the learning rate.
        high: the momentum at both ends.
        pct_start, anneal_strategy, three_phase, length: as those of `one_cycle`.

    Example:
        >>> one_cycle_momentum(length=100)(30)
        0.85

    References:
        Smith and Topin, Super-Convergence (2018).
    """

    low: float = 0.85
    high: float = 0.95
    pct_start: float = 0.3
    anneal_strategy: str = "cos"
    three_phase: bool = False
    length: TimeLike | None = None

    def __post_init__(self) -> None:
        check_numbers(self, low=self.low, high=self.high)
        _check_cycle(self)
        super().__post_init__()

    @property
    def kind(self) -> str:
        return VALUE

    def shape(self, t: Floats, length: float) -> Floats:
        levels = [self.high, self.low, self.high, *([self.high] if self.three_phase else ())]
        return through(t, _turns(self, length), levels, self.anneal_strategy)


def _turns(cycle: OneCycle | OneCycleMomentum, length: float) -> list[float]:
    peak = cycle.pct_start * length
    return [0.0, peak, *([2.0 * peak] if cycle.three_phase else ()), length]


def _check_cycle(cycle: OneCycle | OneCycleMomentum) -> None:
    check_numbers(cycle, pct_start=cycle.pct_start)
    most = 0.5 if cycle.three_phase else 1.0
    if cycle.pct_start > most:
        raise ScheduleError(
            f"{cycle.source_name} was given pct_start={cycle.pct_start!r}; expected a share of the "
            f"length, 0 to {most:g}{' with three phases' if cycle.three_phase else ''}."
        )
    check_choice(cycle, "anneal_strategy", cycle.anneal_strategy, _WAVES)
