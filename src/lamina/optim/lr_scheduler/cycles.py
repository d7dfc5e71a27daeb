"""OneCycleLR and CyclicLR: absolute peaks, one number or one for each group."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from ...errors import ScheduleError
from .base import LRScheduler
from .groups import Group

PerGroup = float | list[float]


class Cycled(LRScheduler):
    """What both share: they may move the momentum against the learning rate."""

    cycle_momentum: bool
    use_beta1: bool

    def _begin_momentum(self, low: PerGroup, high: PerGroup, last_epoch: int) -> None:
        defaults = self.optimizer.defaults
        if "momentum" not in defaults and "betas" not in defaults:
            raise ScheduleError(
                f"{type(self).__name__} moves the momentum, but {type(self.optimizer).__name__} "
                "has neither momentum nor betas; pass cycle_momentum=False."
            )
        self.use_beta1 = "betas" in defaults
        lows = per_group(self, "base_momentum", low)
        highs = per_group(self, "max_momentum", high)
        if last_epoch == -1:
            for group, least, most in zip(self.optimizer.param_groups, lows, highs, strict=True):
                group["max_momentum"], group["base_momentum"] = most, least
                self._set_momentum(group, most)

    def _set_momentum(self, group: Group, value: float) -> None:
        if self.use_beta1:
            group["betas"] = (value, *group["betas"][1:])
        else:
            group["momentum"] = value

    def _update_lr(self, epoch: float | None = None) -> None:
        super()._update_lr(epoch)
        if self.cycle_momentum:
            for index, group in enumerate(self.optimizer.param_groups):
                self._set_momentum(group, self._momentum(index, self.last_epoch))

    def _momentum(self, index: int, step: float) -> float:
        """The momentum of a group at a step."""
        raise NotImplementedError

    def _follow_first_momentum(self, group: Group) -> None:
        """A group that was added takes the range of momentum of the first one."""
        first = self.optimizer.param_groups[0]
        for key in ("max_momentum", "base_momentum"):
            if self.cycle_momentum and key in first:
                group.setdefault(key, first[key])


def per_group(scheduler: LRScheduler, name: str, given: PerGroup) -> list[float]:
    """One number for each group."""
    groups = len(scheduler.optimizer.param_groups)
    if not isinstance(given, (list, tuple)):
        return [float(given)] * groups
    if len(given) != groups:
        raise ScheduleError(
            f"{type(scheduler).__name__} was given {len(given)} values of {name} for "
            f"{groups} groups; give one number, or one for each group."
        )
    return [float(item) for item in given]


def require_optimizer(scheduler: object, optimizer: Any) -> None:
    """Raise `TypeError` for anything that is not an optimizer."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is not an Optimizer.")


def anneal(start: float, end: float, share: float, strategy: str) -> float:
    """From start to end along half a cosine or a line, in torch's order of operations."""
    if strategy == "linear":
        return (end - start) * share + start
    return end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1)
