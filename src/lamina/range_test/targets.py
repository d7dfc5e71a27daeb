"""Whose learning rate is swept, and how an optimizer is copied together with its model."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .._util.numbers import is_number, is_whole
from .._util.text import quoted
from ..errors import PlanError, did_you_mean
from ..optim.engine import Engine
from ..optimizer.optimizer import Optimizer
from ..resolve.timeline import values_at
from ..runtime.overrides import select_groups

#: sets the lr of all swept groups of a copy to so many times what they are
Scale = Callable[[float], None]
#: where a run is searched for its peak: at most so many steps, spread evenly
_SEARCHED = 2000


class Target(ABC):
    """An optimizer whose lr is to be swept; it is only read."""

    #: what the groups are called
    names: list[str]
    #: the lr of each swept group without the test, by its place among all groups
    lr: dict[int, float]
    #: the step of a plan whose values are held; None without a plan
    held: int | None

    def swept(self, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        """Return the parameters of the swept groups, in a copy too."""
        return [param for index in self.lr for param in optimizer.param_groups[index]["params"]]

    @abstractmethod
    def copy(self, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer, Scale]:
        """Return a copy of the model and the optimizer, and what scales the lr of the copy."""

    @abstractmethod
    def written(self, factor: float) -> str:
        """Return how a user takes the suggestion over."""


@dataclass
class PlanTarget(Target):
    """An optimizer under a plan: values and windows are those of one step.

    Args:
        optimizer: the optimizer, which is only read.
        rule: the group or pattern whose lr is swept; None for all.
        at: the step; None for the peak, the step of the rest of the run at which lr, summed over
            the parameters that train, is largest.
    """

    optimizer: Optimizer
    rule: str | None
    at: int | None

    def __post_init__(self) -> None:
        optimizer, resolved = self.optimizer, self.optimizer.resolved
        chosen = select_groups(resolved, self.rule, "find_lr, rule")
        self.names = [cell.name for cell in resolved.cells]
        self.held = step = self._step(chosen)
        values = values_at(resolved, step, optimizer._feedback)
        self.lr = {}
        for index in chosen:
            lr = values.hyper(index).get("lr")
            if lr and values.active(index):
                self.lr[index] = float(lr)
        if not self.lr:
            raise PlanError(
                f"find_lr: at step {self.held} nothing of {self.rule or 'the model'!r} trains "
                "with an lr above 0; name a step at which it does with at=."
            )

    def _step(self, chosen: list[int]) -> int:
        run, clock = self.optimizer.resolved.run, self.optimizer.clock
        if self.at is None:
            return self._peak(chosen, clock, run.steps or clock + _SEARCHED)
        if not is_whole(self.at) or self.at < 0 or (run.steps and self.at >= run.steps):
            length = f" below {run.steps}" if run.steps else ""
            raise PlanError(f"at={self.at!r}: expected a step of the run, counted from 0{length}.")
        return self.at

    def _peak(self, chosen: list[int], begin: int, end: int) -> int:
        resolved = self.optimizer.resolved
        end = max(end, begin + 1)
        steps = np.unique(np.linspace(begin, end - 1, min(_SEARCHED, end - begin)).astype(np.int64))
        values = values_at(resolved, steps, self.optimizer._feedback)
        total = np.zeros(len(steps))
        for index in chosen:
            cell = resolved.cells[index]
            if "lr" in dict(cell.hyper):
                total = total + cell.numel * values.lr(index)  # which is 0 while it rests
        return int(steps[int(np.argmax(total))])

    def copy(self, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer, Scale]:
        """Return a copy of the model, and an optimizer built for it from the plan and the state."""
        twin = copy_model(model, {})
        state = copy.deepcopy(self.optimizer.state_dict())
        live = self.optimizer
        built = Optimizer(live.plan, twin, live.resolved.run, resume=state)
        step = self.held or 0

        def scale(factor: float) -> None:
            built._fix_values(step, dict.fromkeys(self.lr, factor))

        return twin, built, scale

    def written(self, factor: float) -> str:
        """Return the rule that a plan needs."""
        plan, pattern = self.optimizer.plan, "*" if self.rule is None else self.rule
        lr = dict(plan.settings).get("lr")
        if not plan.rules and is_number(lr):
            return f"give the plan lr={lr * factor:.2g}"
        return f"add the last rule lm.Rule({pattern!r}, lr=lm.times({factor:.2g}))"


@dataclass
class TorchTarget(Target):
    """Any other optimizer: its groups, at the lr that a scheduler began with, if there is one.

    Args:
        optimizer: the optimizer, which is only read.
        rule: the name or the number of the group whose lr is swept; None for all.
    """

    optimizer: torch.optim.Optimizer
    rule: str | int | None

    def __post_init__(self) -> None:
        self.held = None
        groups = self.optimizer.param_groups
        self.names = [_name(group, index) for index, group in enumerate(groups)]
        self.lr = {}
        for index in self._chosen():
            group = groups[index]
            lr = group.get("initial_lr", group.get("lr"))
            if lr and any(param.requires_grad for param in group["params"]):
                self.lr[index] = float(lr)
        if len(set(self.names)) < len(self.names):
            self.names = [f"{name} ({index})" for index, name in enumerate(self.names)]
        if not self.lr:
            raise PlanError(
                "find_lr: no group that is to be swept has both an lr above 0 and a parameter that "
                "requires a gradient; give the groups their lr, or thaw them."
            )

    def _chosen(self) -> list[int]:
        if self.rule is None:
            return list(range(len(self.names)))
        if is_whole(self.rule) and 0 <= self.rule < len(self.names):
            return [self.rule]
        if self.rule in self.names:
            return [index for index, name in enumerate(self.names) if name == self.rule]
        raise PlanError(
            f"find_lr, rule={self.rule!r}: expected the number or the name of a parameter group; "
            f"there are {quoted(self.names)}.{did_you_mean(str(self.rule), self.names)}"
        )

    def copy(self, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer, Scale]:
        """Return copies of the model and the optimizer that belong together."""
        memo: dict[int, Any] = {}
        twin = copy_model(model, memo)
        built = _copy_optimizer(self.optimizer, memo)
        for index, group in enumerate(built.param_groups):
            if self.lr.get(index) is None and "initial_lr" in group:
                _write_lr(group, float(group["initial_lr"]))

        def scale(factor: float) -> None:
            for index, lr in self.lr.items():
                _write_lr(built.param_groups[index], factor * lr)

        return twin, built, scale

    def written(self, factor: float) -> str:
        """Return what to do with the groups."""
        what = "every group" if self.rule is None else f"the group {self.rule!r}"
        return f"multiply the lr of {what} by {factor:.2g}"


def copy_model(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a copy of a model, of a compiled one in its ordinary form.

    Raises:
        PlanError: if it cannot be copied.
    """
    try:
        twin: nn.Module = copy.deepcopy(getattr(model, "_orig_mod", model), memo)
    except Exception as error:  # whatever a part of it says
        raise PlanError(
            f"find_lr trains a copy of the model, and this one cannot be copied "
            f"({type(error).__name__}: {error}). Make its copy.deepcopy work, such as by removing "
            "tensors that were computed and kept as attributes."
        ) from error
    return twin


def _copy_optimizer(
    optimizer: torch.optim.Optimizer, memo: dict[int, Any]
) -> torch.optim.Optimizer:
    """Return a copy over the parameters that are in `memo`, without hooks.

    torch's own copies keep only groups and state, so that LBFGS, or an optimizer of another
    package, would lack what it keeps beside them. An attribute `step` is a scheduler's counter,
    which would step the original.
    """
    if isinstance(optimizer, Engine):
        return copy.deepcopy(optimizer, memo)
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    for name, value in vars(optimizer).items():
        if name == "step":
            continue
        hooks = isinstance(value, OrderedDict) and name.endswith("_hooks")
        vars(twin)[name] = OrderedDict() if hooks else copy.deepcopy(value, memo)
    return twin


def _name(group: Mapping[str, Any], index: int) -> str:
    name = group.get("name", group.get("group_name"))
    return name if isinstance(name, str) else f"group {index}"


def _write_lr(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
