"""OneCycleLR and CyclicLR: absolute peaks, one number or one for each group."""

from __future__ import annotations

import math

from ...errors import ScheduleError
from .base import LRScheduler, PlannedLR
from .ledger import Group

PerGroup = float | list[float]


class Cycled(PlannedLR):
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
        self._write_others()

    def _write_others(self) -> None:
        if self.cycle_momentum:
            for index, group in enumerate(self.optimizer.param_groups):
                self._set_momentum(group, self._momentum(index, self.last_epoch))

    def _momentum(self, index: int, step: float) -> float:
        """Return the momentum of a group at a step."""
        raise NotImplementedError

    def _scale(self, index: int, peak: float) -> float:
        """Return the learning rate of a group that was added later, as a share of the first one's.

        Where that one's is 0, its own is its peak.
        """
        record = self._ledger.records[index]
        return float(record.group["lr"]) / peak if record.scale is None else record.scale

    def _follow_first_momentum(self, group: Group) -> None:
        """Return a group that was added takes the range of momentum of the first one."""
        first = self.optimizer.param_groups[0]
        for key in ("max_momentum", "base_momentum"):
            if self.cycle_momentum and key in first:
                group.setdefault(key, first[key])


def per_group(scheduler: LRScheduler, name: str, given: PerGroup) -> list[float]:
    """Return one number for each group."""
    groups = len(scheduler.optimizer.param_groups)
    if not isinstance(given, (list, tuple)):
        return [float(given)] * groups
    if len(given) != groups:
        raise ScheduleError(
            f"{type(scheduler).__name__} was given {len(given)} values of {name} for "
            f"{groups} groups; give one number, or one for each group."
        )
    return [float(item) for item in given]


def anneal(start: float, end: float, share: float, strategy: str) -> float:
    """Go from start to end along half a cosine or a line, in torch's order of operations."""
    if strategy == "linear":
        return (end - start) * share + start
    return end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1)
