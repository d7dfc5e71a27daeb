"""What schedulers with a closed form share: the initial learning rate times a pure curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar, Self

import numpy as np

from ..._util.numbers import is_number
from ...errors import ScheduleError
from ...schedules.duration import Run
from ...schedules.shape import Shape
from .base import PlannedLR
from .ledger import Group, Rate, Record, rounded


@lru_cache(maxsize=128)
def made(kind: Callable[..., Shape], *arguments: Any) -> Shape:
    """Return a pure schedule, made once for the same arguments."""
    schedule = kind(*arguments)
    return schedule if schedule.needs_length else schedule.bind(Run())


@lru_cache(maxsize=1024)
def formula(schedule: Shape, step: float, length: float = math.inf) -> float:
    """Return the value of a pure schedule at a step; held after its length."""
    return float(schedule.shape(np.array([min(step, length)], dtype=float), float(length))[0])


class Curve(PlannedLR):
    """`base_lr * curve(epoch)`, times whatever else moves the learning rate.

    Where nothing else does, the closed form is written as it is, so nothing drifts; else what
    the group holds is multiplied, so that several schedulers on one optimizer give the product.
    """

    _relative: ClassVar[bool] = True
    #: the scheduler with other arguments whose state was loaded, until the next step
    _previous: Curve | None = None
    #: the learning rate where the curve is 0
    eta_min: float = 0.0

    def _wave(self, epoch: float) -> float:
        """Return the curve at an epoch >= 0, held after its end."""
        raise NotImplementedError

    def _closed(self, base: float, wave: float) -> float:
        return self.eta_min + (base - self.eta_min) * wave

    def _follow(self, lr: float, expected: float, target: float, ratio: float) -> float:
        """Return the next lr where something else moved it away from what was expected."""
        return lr * (target / expected)

    def _update_lr(self, epoch: float | None = None) -> None:
        super()._update_lr(epoch)
        self._previous = None

    def _next_lr(self) -> list[Rate]:
        wave = self._wave(self.last_epoch)
        pairs = zip(self._ledger.records, self.base_lrs, strict=True)
        return [self._move(record, float(base), wave) for record, base in pairs]

    def _move(self, record: Record, base: float, wave: float) -> float:
        """Return the learning rate of a group at the next epoch, or at the first."""
        if self._is_initial:
            before, expected = 1.0, base  # as given: the closed form at 1 would round a floor
            stays = self.last_epoch > 0  # resumed: the groups hold loaded values
        else:
            source = self._previous or self
            before = source._wave(max(self.last_epoch - 1, 0))
            expected = source._closed(base, before)
            stays = before == wave and source is self
        target = self._closed(base, wave)
        if _same(record, expected):
            return target
        if stays or expected == 0 or before == 0:
            return record.plain
        return self._follow(record.plain, expected, target, wave / before)

    def _join(self, index: int, group: Group) -> None:
        first, record = self._ledger.records[0], self._ledger.records[index]
        wave = self._wave(max(self.last_epoch, 0))
        if record.brought and _same(first, self._closed(float(self.base_lrs[0]), wave)):
            record.plain = self._closed(record.base, wave)  # not in proportion: there is a floor

    def _get_closed_form_lr(self) -> list[Rate]:
        return list(self.at(self.last_epoch))

    def at(self, step: int) -> list[float]:
        wave = self._wave(step)
        return [self._closed(float(base), wave) for base in self.base_lrs]

    def _go_on_from(self, previous: Self) -> None:
        self._previous = previous


def _same(record: Record, expected: float) -> bool:
    """Return whether a group still holds a value, as precisely as it can hold one."""
    return record.plain in (expected, rounded(record.group["lr"], expected))


def whole(scheduler: object, name: str, given: Any) -> int:
    """Return a whole number of epochs, from an int or a float without fraction."""
    if not is_number(given) or given != int(given):
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
