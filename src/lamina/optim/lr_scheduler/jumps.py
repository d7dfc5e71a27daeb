"""StepLR, MultiStepLR, ConstantLR, ExponentialLR."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import ClassVar

from torch.optim import Optimizer

from ...schedules import exponential, multi_steps, steps
from .curve import Curve, check_share, formula, made, whole


class StepLR(Curve):
    """Lower by gamma every `step_size` epochs; arguments and defaults are torch's."""

    _config: ClassVar[tuple[str, ...]] = ("step_size", "gamma")

    def __init__(
        self,
        optimizer: Optimizer,
        step_size: int,
        gamma: float = 0.1,
        last_epoch: int = -1,
        verbose: object = False,
    ) -> None:
        self.step_size = step_size
        self.gamma = gamma
        self._wave(0)
        super().__init__(optimizer, last_epoch, verbose)

    def _wave(self, epoch: float) -> float:
        return formula(made(steps, whole(self, "step_size", self.step_size), self.gamma), epoch)


class MultiStepLR(Curve):
    """Lower by gamma at each milestone; arguments and defaults are torch's."""

    _config: ClassVar[tuple[str, ...]] = ("milestones", "gamma")

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Iterable[int],
        gamma: float = 0.1,
        last_epoch: int = -1,
        verbose: object = False,
    ) -> None:
        self.milestones = Counter(whole(self, "milestone", place) for place in milestones)
        self.gamma = gamma
        self._wave(0)
        super().__init__(optimizer, last_epoch, verbose)

    def _wave(self, epoch: float) -> float:
        return formula(
            made(multi_steps, tuple(sorted(self.milestones.elements())), self.gamma), epoch
        )


class ConstantLR(Curve):
    """A factor until `total_iters`, then 1; arguments and defaults are torch's."""

    _config: ClassVar[tuple[str, ...]] = ("factor", "total_iters")

    def __init__(
        self,
        optimizer: Optimizer,
        factor: float = 1.0 / 3,
        total_iters: int = 5,
        last_epoch: int = -1,
        verbose: object = False,
    ) -> None:
        check_share(self, "factor", factor)
        self.factor = factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch, verbose)

    def _wave(self, epoch: float) -> float:
        return self.factor if epoch < self.total_iters else 1.0


class ExponentialLR(Curve):
    """Lower by gamma every epoch; arguments and defaults are torch's."""

    _config: ClassVar[tuple[str, ...]] = ("gamma",)

    def __init__(
        self, optimizer: Optimizer, gamma: float, last_epoch: int = -1, verbose: object = False
    ) -> None:
        self.gamma = gamma
        self._wave(0)
        super().__init__(optimizer, last_epoch, verbose)

    def _wave(self, epoch: float) -> float:
        return formula(made(exponential, self.gamma), epoch)
