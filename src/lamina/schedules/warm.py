"""Schedules for the beginning of a run: warmup, inverse square root, Noam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import ScheduleError
from .base import FACTOR, VALUE, Floats
from .duration import TimeLike
from .shape import Shape, check_count, check_numbers, check_positive, progress


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

    length: TimeLike
    start: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self, start=self.start)
        if self.length is None:
            raise ScheduleError("warmup needs a length, such as warmup(500) or warmup('6%').")
        super().__post_init__()

    @property
    def kind(self) -> str:
        return FACTOR

    def shape(self, t: Floats, length: float) -> Floats:
        return self.start + (1.0 - self.start) * progress(t, length)


@dataclass(frozen=True, repr=False)
class InverseSqrt(Shape):
    """A straight warmup to 1, then the inverse square root of time.

    Formula: `t / warmup` before `warmup`, then `sqrt(timescale / (t - warmup + timescale))`.

    Args:
        warmup: when the peak of 1 is reached, in any unit of time.
        timescale: how slowly it falls; `warmup` by default, which gives `sqrt(warmup / t)`.
        length: how long in all; the rest of the run by default.

    Example:
        >>> inverse_sqrt(100)(400)
        0.5

    References:
        Vaswani et al., Attention Is All You Need (2017), section 5.3, scaled to a peak of 1.
    """

    needs_length: ClassVar[bool] = False
    spans: ClassVar[tuple[str, ...]] = ("warmup", "timescale")
    warmup: TimeLike
    timescale: TimeLike | None = None
    length: TimeLike | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timescale is None:
            check_positive(self, warmup=self.warmup)
        check_positive(self, timescale=self.timescale)

    def shape(self, t: Floats, length: float) -> Floats:
        warm = float(self.span("warmup"))
        scale = warm if self.timescale is None else float(self.span("timescale"))
        rise = t / warm if warm > 0 else np.ones_like(t)
        return np.where(t < warm, rise, np.sqrt(scale / (np.maximum(t, warm) - warm + scale)))


@dataclass(frozen=True, repr=False)
class Noam(Shape):
    """The learning rate of the Transformer paper itself: a value, not scaled to a peak of 1.

    Formula: `d_model ** -0.5 * min(s ** -0.5, s * warmup ** -1.5)`, with s = t + 1.

    Args:
        d_model: the width of the model; 1 for the bare formula.
        warmup: when the peak is reached, in any unit of time.
        length: how long in all; the rest of the run by default.

    Example:
        >>> round(noam(512, 4000)(3999), 6)
        0.000699

    References:
        Vaswani et al., Attention Is All You Need (2017), equation 3.
    """

    needs_length: ClassVar[bool] = False
    spans: ClassVar[tuple[str, ...]] = ("warmup",)
    d_model: int
    warmup: TimeLike
    length: TimeLike | None = None

    def __post_init__(self) -> None:
        check_count(self, d_model=self.d_model)
        super().__post_init__()
        check_positive(self, warmup=self.warmup)

    @property
    def kind(self) -> str:
        return VALUE

    def shape(self, t: Floats, length: float) -> Floats:
        warm = float(self.span("warmup"))
        step = t + 1.0
        scale = float(self.d_model) ** -0.5
        rate: Floats = scale * np.minimum(step**-0.5, step * warm**-1.5)
        return rate
