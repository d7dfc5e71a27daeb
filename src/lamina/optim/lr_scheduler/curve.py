"""What schedulers with a closed form share: the initial learning rate times a pure curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ...errors import ScheduleError
from ...schedules.shape import Shape
from ...time import Run
from .base import LRScheduler
from .groups import Rate, own


@lru_cache(maxsize=128)
def made(kind: Callable[..., Shape], *arguments: Any) -> Shape:
    """A pure schedule, made once for the same arguments."""
    schedule = kind(*arguments)
    return schedule if schedule.needs_length else schedule.bind(Run())


@lru_cache(maxsize=1024)
def formula(schedule: Shape, step: float, length: float = math.inf) -> float:
    """The value of a pure schedule at a step; held after its length."""
    return float(schedule.shape(np.array([min(step, length)], dtype=float), float(length))[0])


class Curve(LRScheduler):
    """`base_lr * curve(epoch)`, times whatever else moves the learning rate.

    Where nothing else does, the closed form is written as it is, so nothing drifts; else what
    the group holds is multiplied, so that several schedulers on one optimizer give the product.
    """

    _previous: Curve | None = None
    _old: tuple[Curve, float | None] | None = None

    def _wave(self, epoch: float) -> float:
        """The curve at an epoch >= 0, held after its end."""
        raise NotImplementedError

    def _closed(self, base: float, wave: float) -> float:
        return base * wave

    def _follow(self, lr: float, expected: float, target: float, ratio: float) -> float:
        """The next lr where something else moved it away from what was expected."""
        return lr * (target / expected)

    def _here(self) -> float | None:
        """The curve at the last epoch, or None before the first."""
        return self._wave(self.last_epoch) if self.last_epoch >= 0 else None

    def _update_lr(self, epoch: float | None = None) -> None:
        source = self._previous or self
        self._old = source, source._here()
        super()._update_lr(epoch)
        self._previous = self._old = None

    def get_lr(self) -> list[Rate]:
        if self._outside():
            return self.get_last_lr()
        wave = self._wave(self.last_epoch)
        pairs = zip(self.optimizer.param_groups, self.base_lrs, strict=True)
        return [
            self._next(index, group["lr"], float(base), wave)
            for index, (group, base) in enumerate(pairs)
        ]

    def _next(self, index: int, lr: Rate, base: float, wave: float) -> Rate:
        source, before = self._old or (self, None)
        fresh = before is None or index in self._joined
        if self._is_initial and self.last_epoch > 0:  # resumed: the groups hold loaded values
            return self._closed(base, wave) if _same(lr, base) else own(lr)
        if not fresh and before == wave and source is self:
            return own(lr)
        expected = base if fresh else source._closed(base, before or 0.0)
        target = self._closed(base, wave)
        if _same(lr, expected):
            return target
        if expected == 0:
            return own(lr)
        return self._follow(float(lr), expected, target, wave / (1.0 if fresh else before or 1.0))

    def _get_closed_form_lr(self) -> list[Rate]:
        wave = self._wave(self.last_epoch)
        return [self._closed(float(base), wave) for base in self.base_lrs]

    def at(self, step: int) -> list[float]:
        wave = self._wave(step)
        return [self._closed(float(base), wave) for base in self.base_lrs]

    def _go_on_from(self, previous: Self) -> None:
        self._previous = previous


def _same(lr: Rate, expected: float) -> bool:
    """Whether a group still holds a value, as precisely as it can hold one."""
    if isinstance(lr, Tensor):
        return bool(lr == torch.tensor(expected, dtype=lr.dtype, device=lr.device))
    return lr == expected


def whole(scheduler: object, name: str, given: Any) -> int:
    """A whole number of epochs, from an int or a float without fraction."""
    if isinstance(given, bool) or not isinstance(given, (int, float)) or given != int(given):
        raise ScheduleError(
            f"{type(scheduler).__name__} was given {name}={given!r}; expected a whole number."
        )
    return int(given)


def check_share(scheduler: object, name: str, given: float) -> None:
    """Raise `ScheduleError` unless a factor is between 0 and 1."""
    if not 0 <= given <= 1:
        raise ScheduleError(
            f"{type(scheduler).__name__} was given {name}={given!r}; expected 0 to 1."
        )
