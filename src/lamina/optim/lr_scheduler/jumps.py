"""StepLR, MultiStepLR, ConstantLR, ExponentialLR."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar

from torch.optim import Optimizer

from ...schedules import exponential, multi_step, step_decay
from .curve import Curve, check_share, formula, made, whole
from .ledger import Multiplier, Rate


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
        return formula(
            made(step_decay, whole(self, "step_size", self.step_size), self.gamma), epoch
        )


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
            made(multi_step, tuple(sorted(self.milestones.elements())), self.gamma), epoch
        )


class ConstantLR(Curve):
    """A factor until `total_iters`, then 1; arguments and defaults are torch's.

    A factor of 0, which torch cannot take back, is kept in the ledger beside what others do.
    """

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
        if factor == 0:
            self._multiplier = Multiplier(overwrites=False)
        super().__init__(optimizer, last_epoch, verbose)

    def _wave(self, epoch: float) -> float:
        return self.factor if epoch < self.total_iters else 1.0

    def _update_lr(self, epoch: float | None = None) -> None:
        if self._multiplier is None:
            super()._update_lr(epoch)
            return
        ledger, multiplier = self._read(), self._multiplier
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch  # type: ignore[assignment]
        if epoch is not None:
            ledger.begin_again(multiplier, within=False)
        self._get_lr_called_within_step = False  # a key that torch's state has
        share = self._wave(self.last_epoch)
        if self._is_initial or epoch is not None or share != multiplier.share:
            ledger.multiply(multiplier, share, self.base_lrs)
        ledger.write(self, [record.plain for record in ledger.records], made=self._is_initial)

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the optimizer; while the factor is 0, the old rates too."""
        state = super().state_dict()
        multiplier = self._multiplier
        if multiplier is not None and multiplier.counts and multiplier.share == 0:
            state["_plain"] = [record.plain for record in self._ledger.records]
        return state

    def _load(self, state_dict: dict[str, Any]) -> None:
        plain: list[Rate] = state_dict.get("_plain", [])
        super()._load({key: value for key, value in state_dict.items() if key != "_plain"})
        if self._multiplier is not None:
            self._multiplier.share = self._wave(self.last_epoch)
            self._multiplier.restored = True
            for record, value in zip(self._ledger.records, plain, strict=False):
                record.plain = float(value)


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
