"""LambdaLR and MultiplicativeLR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch.optim import Optimizer

from ...errors import ScheduleError
from .base import PlannedLR, state_of
from .ledger import Group, Rate, as_held

Lambda = Callable[[int], float]


class _Lambdas(PlannedLR):
    """One function for all groups, or one for each."""

    _hidden: ClassVar[tuple[str, ...]] = (*PlannedLR._hidden, "lr_lambdas", "_shared")

    def __init__(
        self,
        optimizer: Optimizer,
        lr_lambda: Lambda | Sequence[Lambda],
        last_epoch: int = -1,
        verbose: object = False,
    ) -> None:
        groups = len(optimizer.param_groups)
        many = list(lr_lambda) if isinstance(lr_lambda, (list, tuple)) else None
        if many is not None and len(many) != groups:
            raise ScheduleError(f"Expected {groups} lr_lambdas, but got {len(many)}.")
        self._shared: Any = lr_lambda if many is None else None
        every: list[Any] = [lr_lambda] * groups if many is None else many
        self.lr_lambdas: list[Lambda] = every
        for function in self.lr_lambdas:
            if not callable(function):
                raise TypeError(
                    f"lr_lambda should be a function, but got {type(function).__name__}."
                )
        super().__init__(optimizer, last_epoch, verbose)

    def _join(self, index: int, group: Group) -> None:
        if index >= len(self.lr_lambdas):
            if self._shared is None:
                raise ScheduleError(
                    f"group {index} was added to the optimizer, but {type(self).__name__} was "
                    "given one function for each group; append one for it to "
                    "scheduler.lr_lambdas."
                )
            self.lr_lambdas.append(self._shared)
        elif self._shared is None:
            self._join_by_own_function(index, group)

    def _join_by_own_function(self, index: int, group: Group) -> None:
        """Take in a group that follows a function of its own, by which its base is found."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the optimizer and plain functions; callable objects are kept."""
        return {**super().state_dict(), "lr_lambdas": [state_of(f) for f in self.lr_lambdas]}

    def _load(self, state_dict: dict[str, Any]) -> None:
        super()._load(state_dict)
        saved = state_dict.get("lr_lambdas", ())
        for function, attributes in zip(self.lr_lambdas, saved, strict=False):
            if attributes:
                vars(function).update(attributes)


class LambdaLR(_Lambdas):
    """The initial learning rate times a function of the epoch; arguments are torch's."""

    def at(self, step: int) -> list[float]:
        pairs = zip(self.base_lrs, self.lr_lambdas, strict=True)
        return [float(base) * function(step) for base, function in pairs]

    def _join_by_own_function(self, index: int, group: Group) -> None:
        record = self._ledger.records[index]
        now = self.lr_lambdas[index](self.last_epoch)
        if not record.brought and now != 0:
            record.base = record.plain / now
            group["initial_lr"] = as_held(group["lr"], record.base)


class MultiplicativeLR(_Lambdas):
    """The learning rate times a function of the epoch, at each step; arguments are torch's."""

    _relative: ClassVar[bool] = True

    def _next_lr(self) -> list[Rate]:
        records = self._ledger.records
        if self._is_initial:
            return [record.plain for record in records]
        pairs = zip(records, self.lr_lambdas, strict=True)
        return [record.plain * function(self.last_epoch) for record, function in pairs]

    def at(self, step: int) -> list[float]:
        rates = [float(base) for base in self.base_lrs]
        for epoch in range(1, step + 1):
            rates = [rate * f(epoch) for rate, f in zip(rates, self.lr_lambdas, strict=True)]
        return rates
