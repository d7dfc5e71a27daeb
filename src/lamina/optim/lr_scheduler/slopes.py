"""LinearLR, PolynomialLR, CosineAnnealingLR, and the warmups."""

from __future__ import annotations

import math
from typing import ClassVar

from torch.optim import Optimizer

from ...errors import ScheduleError
from ...schedules import linear, noam, polynomial
from .curve import Curve, check_share, formula, made, whole
from .groups import warn_floor


class LinearLR(Curve):
    """A line from one factor to another; arguments and defaults are torch's."""

    _config: ClassVar[tuple[str, ...]] = ("start_factor", "end_factor", "total_iters")

    def __init__(
        self,
        optimizer: Optimizer,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
        verbose: object = False,
    ) -> None:
        check_share(self, "start_factor", start_factor)
        check_share(self, "end_factor", end_factor)
        if start_factor == 0:
            raise ScheduleError("LinearLR was given start_factor=0; expected more than 0.")
        self.start_factor = start_factor
        self.end_factor = end_factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch, verbose)

    def _wave(self, epoch: float) -> float:
        return formula(made(linear, self.start_factor, self.end_factor), epoch, self.total_iters)

    def _planned(self) -> int | None:
        return math.ceil(self.total_iters) + 1


class PolynomialLR(Curve):
    """A power of the epochs that remain; arguments and defaults are torch's."""

    _config: ClassVar[tuple[str, ...]] = ("total_iters", "power")

    def __init__(
        self,
        optimizer: Optimizer,
        total_iters: int = 5,
        power: float = 1.0,
        last_epoch: int = -1,
        verbose: object = False,
    ) -> None:
        self.total_iters = total_iters
        self.power = power
        self._wave(0)
        super().__init__(optimizer, last_epoch, verbose)

    def _wave(self, epoch: float) -> float:
        if self.total_iters == 0 or self.power == 0:
            return 1.0
        return formula(made(polynomial, self.power), epoch, self.total_iters)

    def _planned(self) -> int | None:
        return math.ceil(self.total_iters) + 1


class CosineAnnealingLR(Curve):
    """Half a cosine down to `eta_min`, and held there; arguments and defaults are torch's."""

    _config: ClassVar[tuple[str, ...]] = ("T_max", "eta_min")

    def __init__(
        self,
        optimizer: Optimizer,
        T_max: int,
        eta_min: float = 0.0,
        last_epoch: int = -1,
        verbose: object = False,
    ) -> None:
        if not T_max > 0:
            raise ScheduleError(f"CosineAnnealingLR was given T_max={T_max!r}; expected above 0.")
        self.T_max = T_max
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch, verbose)
        warn_floor(self, eta_min, "schedule=lamina.cosine(to=0.01)")

    def _initial_step(self) -> None:
        if self.eta_min:  # the floor is one of the whole learning rate
            self._ledger.settle()
        super()._initial_step()

    def _wave(self, epoch: float) -> float:
        # With Python's cosine, in torch's order: near the end 1 + cos(x) keeps few digits.
        return 0.0 if epoch >= self.T_max else (1 + math.cos(math.pi * epoch / self.T_max)) / 2

    def _follow(self, lr: float, expected: float, target: float, ratio: float) -> float:
        return self.eta_min + (lr - self.eta_min) * ratio  # chained as in torch: the floor is kept

    def _planned(self) -> int | None:
        return math.ceil(self.T_max) + 1


class WarmupLR(Curve):
    """Inverse square root warmup: `base_lr * min(s ** -0.5, s * num_warm ** -1.5)`, s from 1.

    The peak, at step `num_warm`, is `base_lr * num_warm ** -0.5`.

    Args:
        optimizer: any optimizer of lamina or torch.
        num_warm: the step of the peak.
        last_epoch, verbose: as those of `LRScheduler`.
    """

    _config: ClassVar[tuple[str, ...]] = ("num_warm",)

    def __init__(
        self, optimizer: Optimizer, num_warm: int, last_epoch: int = -1, verbose: object = False
    ) -> None:
        self.num_warm = num_warm
        self._wave(0)
        super().__init__(optimizer, last_epoch, verbose)

    def _wave(self, epoch: float) -> float:
        return formula(made(noam, 1, whole(self, "num_warm", self.num_warm)), epoch)


class LinearWarmupLR(Curve):
    """Linear warmup: `base_lr * min(1, s / num_warm)`, s from 1.

    Args:
        optimizer: any optimizer of lamina or torch.
        num_warm: the step that first has the full learning rate.
        last_epoch, verbose: as those of `LRScheduler`.
    """

    _config: ClassVar[tuple[str, ...]] = ("num_warm",)

    def __init__(
        self, optimizer: Optimizer, num_warm: int, last_epoch: int = -1, verbose: object = False
    ) -> None:
        self.num_warm = whole(self, "num_warm", num_warm)
        super().__init__(optimizer, last_epoch, verbose)

    def _wave(self, epoch: float) -> float:
        return formula(made(linear, 0.0, 1.0), epoch + 1, self.num_warm)

    def _planned(self) -> int | None:
        return self.num_warm
