"""CosineAnnealingWarmRestarts."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

from torch.optim import Optimizer

from ..._util.numbers import is_whole
from ...errors import ScheduleError
from .curve import Curve
from .groups import warn_floor
from .ledger import Multiplier


class CosineAnnealingWarmRestarts(Curve):
    """Cosines down to `eta_min`, one after the other; arguments and defaults are torch's.

    Unlike torch's it multiplies what other schedulers do, so that a warmup before it works. An
    edit of the learning rate by hand is overwritten at the next step, as in torch.
    """

    _config: ClassVar[tuple[str, ...]] = ("T_0", "T_mult", "eta_min")
    _multiplier: Multiplier

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
            if not is_whole(given) or given < 1:
                raise ScheduleError(
                    f"CosineAnnealingWarmRestarts was given {name}={given!r}; "
                    "expected a whole number above 0."
                )
        self.T_0 = T_0
        self.T_i: float = T_0
        self.T_mult = T_mult
        self.eta_min = eta_min
        self.T_cur: float = last_epoch
        self._multiplier = Multiplier(floor=eta_min)
        super().__init__(optimizer, last_epoch, verbose)
        warn_floor(self, eta_min, "schedule=lamina.warm_restarts(first=..., to=0.01)")

    def _place(self, epoch: float) -> tuple[float, float]:
        """Return where an epoch is in its cycle, and how long that cycle is."""
        if self.T_mult == 1:
            return epoch % self.T_0, self.T_0
        size = self.T_0
        while epoch >= size:
            epoch -= size
            size *= self.T_mult
        return epoch, size

    def _wave(self, epoch: float) -> float:
        return _half_cosine(*self._place(epoch))

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
        if epoch is not None:  # its turn in a sequence: it begins anew, from the initial lr
            self._go_to(epoch, *self._place(epoch), anew=True)
        elif self._is_initial or self.last_epoch < 0:
            self._go_to(self.last_epoch + 1, *self._place(self.last_epoch + 1), anew=True)
        elif self.T_cur + 1 < self.T_i:
            self._go_to(self.last_epoch + 1, self.T_cur + 1, self.T_i)
        else:
            after = (self.T_cur + 1) % self.T_i
            self._go_to(self.last_epoch + 1, after, self.T_i * self.T_mult)

    def _go_to(self, epoch: float, place: float, size: float, *, anew: bool = False) -> None:
        ledger = self._read()
        self.T_cur, self.T_i = place, size
        self.last_epoch = math.floor(epoch)
        self._get_lr_called_within_step = False  # a key that torch's state has
        ledger.multiply(self._multiplier, _half_cosine(place, size), self.base_lrs)
        if anew:
            ledger.begin_again(self._multiplier, within=self._is_initial)
        ledger.write(self, [record.plain for record in ledger.records], made=self._is_initial)

    def _load(self, state_dict: dict[str, Any]) -> None:
        super()._load(state_dict)
        if self.last_epoch >= 0:
            # The part of the saved learning rates that is this schedule's, by its saved arguments.
            saved = [state_dict.get(key, getattr(self, key)) for key in ("T_cur", "T_i", "eta_min")]
            self._multiplier.share, self._multiplier.floor = _half_cosine(*saved[:2]), saved[2]
            self._multiplier.bases = list(self.base_lrs)
            self._multiplier.restored = True

    def _go_on_from(self, previous: Self) -> None:
        if self.last_epoch >= 0:
            self.T_cur, self.T_i = self._place(self.last_epoch)


def _half_cosine(place: float, size: float) -> float:
    return (1 + math.cos(math.pi * place / size)) / 2
