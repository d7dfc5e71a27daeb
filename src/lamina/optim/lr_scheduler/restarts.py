"""CosineAnnealingWarmRestarts."""

from __future__ import annotations

import math
from typing import ClassVar, Self

from torch.optim import Optimizer

from ...errors import ScheduleError
from .curve import Curve
from .groups import warn_floor, write


class CosineAnnealingWarmRestarts(Curve):
    """Cosines down to `eta_min`, one after the other; arguments and defaults are torch's.

    Unlike torch's it multiplies what other schedulers do, so that a warmup before it works.
    """

    _config: ClassVar[tuple[str, ...]] = ("T_0", "T_mult", "eta_min")

    def __init__(
        self,
        optimizer: Optimizer,
        T_0: int,
        T_mult: int = 1,
        eta_min: float = 0.0,
        last_epoch: int = -1,
        verbose: object = False,
    ) -> None:
        for name, given in (("T_0", T_0), ("T_mult", T_mult)):
            if isinstance(given, bool) or not isinstance(given, int) or given < 1:
                raise ScheduleError(
                    f"CosineAnnealingWarmRestarts was given {name}={given!r}; "
                    "expected a whole number above 0."
                )
        self.T_0 = T_0
        self.T_i: float = T_0
        self.T_mult = T_mult
        self.eta_min = eta_min
        self.T_cur: float = last_epoch
        super().__init__(optimizer, last_epoch, verbose)
        warn_floor(self, eta_min, "schedule=lamina.warm_restarts(first=..., to=0.01)")

    def _place(self, epoch: float) -> tuple[float, float]:
        """Where an epoch is in its cycle, and how long that cycle is."""
        if self.T_mult == 1:
            return epoch % self.T_0, self.T_0
        size = self.T_0
        while epoch >= size:
            epoch -= size
            size *= self.T_mult
        return epoch, size

    def _wave(self, epoch: float) -> float:
        return _half_cosine(*self._place(epoch))

    def _closed(self, base: float, wave: float) -> float:
        return self.eta_min + (base - self.eta_min) * wave

    def _here(self) -> float | None:
        return _half_cosine(self.T_cur, self.T_i) if self.last_epoch >= 0 else None

    def step(self, epoch: float | None = None) -> None:
        """Go on to the next epoch, or to a given one, which may be a fraction.

        Args:
            epoch: such as `epoch + batch / batches`; the next whole one by default.
        """
        if epoch is None:
            super().step()
            return
        if not 0 <= epoch < math.inf:
            raise ScheduleError(f"step was given epoch={epoch!r}; expected at least 0.")
        self._step_count += 1
        self._go_to(epoch, *self._place(epoch))

    def _update_lr(self, epoch: float | None = None) -> None:
        if epoch is not None:  # SequentialLR begins anew
            self._admit()
            self.T_cur, self.T_i = self._place(epoch)
            self.last_epoch = math.floor(epoch)
            write(self, [self._closed(float(b), self._wave(epoch)) for b in self.base_lrs])
        elif self._is_initial or self.last_epoch < 0:
            self._go_to(self.last_epoch + 1, *self._place(self.last_epoch + 1))
        elif self.T_cur + 1 < self.T_i:
            self._go_to(self.last_epoch + 1, self.T_cur + 1, self.T_i)
        else:
            after = (self.T_cur + 1) % self.T_i
            self._go_to(self.last_epoch + 1, after, self.T_i * self.T_mult)

    def _go_to(self, epoch: float, place: float, size: float) -> None:
        source = self._previous or self
        self._old = source, source._here()
        self._admit()
        self.T_cur, self.T_i = place, size
        self.last_epoch = math.floor(epoch)
        wave = _half_cosine(place, size)
        pairs = zip(self.optimizer.param_groups, self.base_lrs, strict=True)
        values = [self._next(i, g["lr"], float(b), wave) for i, (g, b) in enumerate(pairs)]
        write(self, values)
        self._get_lr_called_within_step = False  # a key that torch's state has
        self._previous = self._old = None
        self._joined = ()

    def _go_on_from(self, previous: Self) -> None:
        super()._go_on_from(previous)
        if self.last_epoch >= 0:
            self.T_cur, self.T_i = self._place(self.last_epoch)


def _half_cosine(place: float, size: float) -> float:
    return (1 + math.cos(math.pi * place / size)) / 2
