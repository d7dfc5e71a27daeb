"""Windows on a model: `requires_grad` and module modes follow them, and it can all be undone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .claims import Claim
from .holding import EvalLocks
from .parameters import Owned, frozen_by_plan, mark_frozen, set_requires_grad
from .resolved import Cell

Groups = Sequence[dict[str, Any]]


class Freezer:
    """Sets `requires_grad` of the parameters of each cell, marked as the plan's doing.

    Under DDP, whose reducer is fixed when it wraps, parts that thaw later keep requires_grad on
    and only their gradients are dropped; so does everything in a model that is wrapped already.
    `toggles` says for each cell whether the flag is used. What the model's owner froze before the
    plan, and no rule speaks of, is left alone.

    Args:
        model: the model.
        cells: the cells of the plan.
        owned: the parameters of the model.
        claim: what other plans in force are asked through.
    """

    def __init__(
        self, model: nn.Module, cells: Sequence[Cell], owned: Sequence[Owned], claim: Claim
    ) -> None:
        by_name = {item.info.name: item for item in owned}
        reducer = has_reducer([item.tensor for item in owned])
        self.active: list[bool | None] = [None] * len(cells)
        #: how many parameters had a gradient in the last step; at first all that train
        self.with_gradient = 0
        wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
        self.toggles = [not reducer or not (cell.windows or wrapped) for cell in cells]
        self._keeps_on = reducer and not wrapped  # the flag, where it is not used
        self._cells = cells
        self._places = [[by_name[info.name].places for info in cell.parameters] for cell in cells]
        self._claim = claim
        #: gradients of parameters that the step must not see, until its end
        self._aside: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._released = False
        self.locks = EvalLocks(model, owned)

    def follow(self, groups: Groups, active: Sequence[bool]) -> None:
        """Let each cell train or rest; what does not change is not touched.

        Raises:
            PlanError: if a flag cannot be set; no flag was changed.
        """
        changed = [i for i, now in enumerate(active) if now != self.active[i]]
        if changed and not self._released:
            set_requires_grad(self._flags(changed, groups, active))
            for index in changed:
                self._mark(index, groups[index]["params"], active[index])
        self.active = list(active)
        if changed and not self._released:
            self.with_gradient = sum(
                len(group["params"]) for group, now in zip(groups, active, strict=True) if now
            )
            self._lock(groups)

    @contextmanager
    def undone_on_error(self, owned: Sequence[Owned]) -> Iterator[None]:
        """Give the model its flags and locks of now back if a build fails inside."""
        locks = self.locks.snapshot()
        before = [
            (item, item.tensor.requires_grad, frozen_by_plan(item.tensor, item.places))
            for item in owned
        ]
        try:
            yield
        except BaseException:
            for item, flag, by_plan in before:
                if item.tensor.requires_grad != flag:
                    item.tensor.requires_grad_(flag)
                if frozen_by_plan(item.tensor, item.places) != by_plan:
                    mark_frozen(item.places, "plan" if by_plan else None)
            self.locks.restore(locks)
            self._claim.leave()
            raise

    def release(self, groups: Groups) -> None:
        """Give every parameter back the `requires_grad` it had before the plan, and its module.

        What another plan in force freezes or trains too is left to it.
        """
        if self._released:
            return
        others = self._claim.governed_elsewhere()
        rows = [
            (info, places, param)
            for cell, held_by, group in zip(self._cells, self._places, groups, strict=True)
            if not cell.by_model
            for info, places, param in zip(cell.parameters, held_by, group["params"], strict=True)
            if id(param) not in others
        ]
        set_requires_grad((info.name, param, info.requires_grad) for info, _, param in rows)
        for _, places, _ in rows:
            mark_frozen(places, None)
        self.locks.release()
        self._claim.leave()
        self._released = True

    def drop(self, groups: Groups) -> list[tuple[Cell, list[str]]]:
        """Forget the gradients of what the plan froze.

        Those of what the model's owner froze are not the plan's, nor are those of what another plan
        in force trains now: they are set aside until the end of the step.

        Returns:
            The names of parameters that had one because `requires_grad` was turned on by hand.
        """
        found = []
        for index, (group, active) in enumerate(zip(groups, self.active, strict=True)):
            if not active:
                names = self._drop(index, group)
                if names:
                    found.append((self._cells[index], names))
        return found

    def set_aside(self, param: torch.Tensor) -> None:
        """Hide a gradient from the step: guests and L-BFGS update whatever has one."""
        if param.grad is not None:
            self._aside.append((param, param.grad))
            param.grad = None

    def put_back(self) -> None:
        """Give the parameters the gradients back that were set aside."""
        for param, grad in self._aside:
            param.grad = grad if param.grad is None else param.grad + grad
        self._aside.clear()

    def turned(self, groups: Groups) -> Iterator[tuple[Cell, list[str], list[torch.Tensor]]]:
        """Yield each cell with the parameters whose `requires_grad` contradicts the plan."""
        if self._released:
            return
        others = self._claim.trained_elsewhere()
        for index, (cell, group) in enumerate(zip(self._cells, groups, strict=True)):
            active = bool(self.active[index])
            if not active and self._keeps_flag(index):
                continue
            found = [
                (name, param)
                for name, param in zip(group["param_names"], group["params"], strict=True)
                if param.requires_grad != active and (active or id(param) not in others)
            ]
            if found:
                yield cell, [name for name, _ in found], [param for _, param in found]

    def _drop(self, index: int, group: dict[str, Any]) -> list[str]:
        cell = self._cells[index]
        if self._released:
            for param in group["params"]:
                self.set_aside(param)
            return []
        found = [param for param in group["params"] if param.grad is not None]
        if not found:
            return []
        others = self._claim.trained_elsewhere()
        turned: set[int] = set()
        for param in found:
            if id(param) in others:
                self.set_aside(param)
                continue
            if param.requires_grad and not self._keeps_flag(index):
                turned.add(id(param))
            if cell.by_model:
                self.set_aside(param)
            else:
                param.grad = None
        pairs = zip(group["param_names"], group["params"], strict=True)
        return [name for name, param in pairs if id(param) in turned]

    def _keeps_flag(self, index: int) -> bool:
        """Return whether a reducer needs the flag of what is frozen in a cell."""
        return not self.toggles[index] and not self._cells[index].by_model

    def _lock(self, groups: Groups) -> None:
        rest: list[str] = []
        aside: list[str] = []  # frozen by hand, before the plan or since the build
        for cell, group, now in zip(self._cells, groups, self.active, strict=True):
            if now:
                pairs = zip(cell.parameters, group["params"], strict=True)
                aside += [info.name for info, param in pairs if not param.requires_grad]
            elif cell.by_model:
                aside += [info.name for info in cell.parameters]
            elif cell.hold:
                rest += [info.name for info in cell.parameters]
        self.locks.follow(rest, aside)

    def _flags(
        self, changed: Sequence[int], groups: Groups, active: Sequence[bool]
    ) -> Iterator[tuple[str, torch.Tensor, bool]]:
        for index in changed:
            flag = active[index]
            if self._cells[index].by_model:
                continue
            if not self.toggles[index]:
                if not self._keeps_on or not (flag or self.active[index] is None):
                    continue
                flag = True  # off before the build, or by hand since
            for info, param in zip(
                self._cells[index].parameters, groups[index]["params"], strict=True
            ):
                yield info.name, param, flag

    def _mark(self, index: int, params: Sequence[torch.Tensor], active: bool) -> None:
        cell = self._cells[index]
        if cell.by_model:
            return
        if not active:
            drop_gradients(params)
        if self.toggles[index]:
            for info, places in zip(cell.parameters, self._places[index], strict=True):
                # What was frozen before the plan came is not the plan's doing: no mark.
                mark_frozen(places, "plan" if not active and info.requires_grad else None)


def drop_gradients(params: Sequence[torch.Tensor]) -> None:
    """Forget gradients that are left over from before a freeze, or computed in spite of it."""
    for param in params:
        param.grad = None


def has_reducer(params: Sequence[torch.Tensor]) -> bool:
    """Whether gradients are reduced by DDP, which is fixed when the model is wrapped."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return not any(type(param).__name__ == "DTensor" for param in params)
