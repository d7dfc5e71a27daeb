"""What gradient operations have in common: the gradients they work on, the checks of arguments."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from .._util.grammar import Expression
from .._util.numbers import python_number
from .._util.sharding import Shards
from ..algorithms.base import times
from ..errors import PlanError
from ..model.parameters import ParamInfo
from ..schedules import Schedule
from .norms import each_norm, total

Amount = float | Schedule
Grads = list[torch.Tensor]


@dataclass
class ScopeGradients:
    """The gradients of one scope on their way through its operations.

    `scale` is a factor still to be multiplied onto every gradient; `norms` the scalar tensors
    that were computed anyway, which tell whether everything is finite; `made` what functions of
    the user's own returned, to name the one that returned something else. `shards` is there where
    the gradients are parts of those of all processes: of FSDP1, whose tensors do not tell.
    """

    grads: Grads
    params: Sequence[torch.Tensor]
    infos: Sequence[ParamInfo]
    shards: Shards | None = None
    scale: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    norms: list[torch.Tensor] = field(default_factory=list)
    made: list[tuple[Operation, Grads]] = field(default_factory=list)

    def settle(self) -> Grads:
        """The gradients with the pending factor multiplied on, as new tensors."""
        if self.scale is not None:
            self.grads = [times(grad, self.scale) for grad in self.grads]
            self.scale = None
        return self.grads

    def each_norm(self, p: float) -> list[torch.Tensor]:
        """Return the p-norm of each gradient; they are kept in `norms` too."""
        own = each_norm(self.grads, p)
        if self.shards is None:
            self.norms += own
            return own
        names = [info.name for info in self.infos]
        whole = self.shards.norms(names, own, p)
        self.norms += whole  # also of what this process has no part of: all must judge alike
        return self.shards.of(names, whole)

    def total_norm(self, p: float) -> torch.Tensor:
        """Return the p-norm of all gradients together, as if they were one vector."""
        own = each_norm(self.grads, p)
        if self.shards is not None:
            own = self.shards.norms([info.name for info in self.infos], own, p)
        return total(own, p)

    def multiply(self, factor: torch.Tensor) -> None:
        """Put one more factor on every gradient."""
        self.scale = factor if self.scale is None else self.scale * factor


class Operation(Expression, ABC):
    """One gradient operation of a scope; `amount` is its number, or a schedule of it.

    `measures` says whether it computes norms, which tell of a gradient that is not finite; `whole`
    whether it must see whole tensors, where a norm of parts does not do; `each` whether it treats
    each parameter by itself.
    """

    measures: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    each: ClassVar[bool] = False
    amount: Amount

    @abstractmethod
    def run(self, work: ScopeGradients, amount: float) -> None:
        """Change the gradients of a scope; `amount` is the number at this step."""

    def check(self, low_open: bool = True) -> None:
        """Raise `PlanError` unless the amount is a positive number or a value schedule."""
        amount = python_number(self.amount)
        object.__setattr__(self, "amount", amount)
        if isinstance(amount, Schedule):
            if amount.kind == "factor":
                raise PlanError(
                    f"{self.source_name}({amount!r}): the schedule is a factor; a threshold is a "
                    "value: give it a start."
                )
            return
        ok = isinstance(amount, (int, float)) and not isinstance(amount, bool)
        if not ok or not 0 <= amount < math.inf or (low_open and amount == 0):
            limit = "above 0" if low_open else "of at least 0"
            raise PlanError(
                f"{self.source_name} was given {amount!r}; expected a finite number {limit}."
            )

    def check_order(self, p: Any) -> None:
        """Raise `PlanError` unless `p` is the order of a norm."""
        p = python_number(p)
        object.__setattr__(self, "p", p)
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not p > 0:
            raise PlanError(
                f"{self.source_name} was given p={p!r}; expected a number above 0, or float('inf') "
                "for the largest number."
            )
