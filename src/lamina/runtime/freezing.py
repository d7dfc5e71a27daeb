"""Windows on a model: `requires_grad` and module modes follow them, and it can all be undone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._util.sharding import is_sharded
from ..model.eval_lock import EvalLocks
from ..model.parameters import Owned, frozen_by_plan, mark_frozen, set_requires_grad
from ..model.reducers import free_gradients, has_zero_gradients
from ..resolve.resolved import Cell
from .claims import Claim
from .flags import MAY_BE_WRAPPED, FlagKeeper, Groups, trains_from


class Freezer:
    """Sets `requires_grad` of the parameters of each cell, marked as the plan's doing.

    What a DDP reducer holds keeps the flag on (see `FlagKeeper`). What the model's owner froze
    before the plan, and no rule speaks of, is left alone.

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
        self.active: list[bool | None] = [None] * len(cells)
        #: how many parameters had a gradient in the last step; at first all that train
        self.with_gradient = 0
        #: how many parameters train in the step that comes next
        self.trained = 0
        self.flags = FlagKeeper(model, cells)
        self._cells = cells
        self._places = [[by_name[info.name].places for info in cell.parameters] for cell in cells]
        self._claim = claim
        #: gradients of parameters that the step must not see, until its end
        self._aside: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._released = False
        self.locks = EvalLocks(model, owned)

    def follow(self, groups: Groups, active: Sequence[bool], clock: int) -> None:
        """Let each cell train or rest; what does not change is not touched.

        Args:
            groups: the parameter groups, one for each cell.
            active: whether each trains in the step that comes next.
            clock: the number of that step.

        Raises:
            PlanError: if what must train is not reduced by DDP, or a flag cannot be set; no flag
                was changed.
        """
        changed: list[int] = []
        if active != self.active:
            changed = [i for i, now in enumerate(active) if now != self.active[i]]
        if changed and not self._released:
            self.flags.measure(groups, clock, in_step=self.flags.settled)
            rows = [
                (index, place, param, active[index])
                for index in changed
                if not self._cells[index].by_model
                for place, param in enumerate(groups[index]["params"])
            ]
            self._set(rows, clock)
        self.active = list(active)
        if changed:
            pairs = zip(groups, active, strict=True)
            self.trained = sum(len(group["params"]) for group, now in pairs if now)
            if not self._released:
                self.with_gradient = self.trained
                self._lock(groups)

    def settle(self, groups: Groups, clock: int) -> None:
        """Look once more in the first step: the model may have been wrapped since the build.

        Raises:
            PlanError: if what must train is not reduced by DDP; nothing was changed.
        """
        self.flags.measure(groups, clock, in_step=True)
        rows = [
            (index, place, param, False)
            for index, (cell, group) in enumerate(zip(self._cells, groups, strict=True))
            if not self.active[index] and not cell.by_model and not self._released
            for place, param in enumerate(group["params"])
            # What FSDP2 made of a parameter has its flag, and not its hook.
            if self.flags.keeps(cell, param, clock) != has_zero_gradients(param)
            or (is_sharded(param) and param.requires_grad)
        ]
        self._set(rows, clock)

    def keeps_for_wrapping(self, groups: Groups, clock: int) -> bool:
        """Return whether a frozen parameter keeps the flag only because DDP may yet wrap it."""
        rows = zip(self._cells, groups, self.active, strict=True)
        resting = (
            (cell, param) for cell, group, now in rows if not now for param in group["params"]
        )
        return any(self.flags.reason(*each, clock) == MAY_BE_WRAPPED for each in resting)

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
                free_gradients(item.tensor)
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
        for _, places, param in rows:
            free_gradients(param)
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
        found: list[tuple[Cell, list[str]]] = []
        if all(self.active):
            return found
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
            found = [
                (name, param)
                for name, param in zip(group["param_names"], group["params"], strict=True)
                if param.requires_grad != active
                and (active or not (id(param) in others or has_zero_gradients(param)))
            ]
            if found:
                yield cell, [name for name, _ in found], [param for _, param in found]

    def _drop(self, index: int, group: dict[str, Any]) -> list[str]:
        # Asked at every step, and mostly all there is to do.
        if all(param.grad is None for param in group["params"]):
            return []
        others = self._claim.trained_elsewhere()
        turned = []
        for name, param in zip(group["param_names"], group["params"], strict=True):
            ours = not self._released and id(param) not in others
            by_hand = param.requires_grad and not has_zero_gradients(param)
            if ours and by_hand and param.grad is not None:
                turned.append(name)
            if ours and not self._cells[index].by_model:
                param.grad = None
            else:
                self.set_aside(param)
        return turned

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

    def _set(self, rows: Sequence[tuple[int, int, torch.Tensor, bool]], clock: int) -> None:
        """Let parameters train or rest: given are their cell, their place in it, and which."""
        keeps = [not now and self.flags.keeps(self._cells[i], p, clock) for i, _, p, now in rows]
        set_requires_grad(
            (self._cells[index].parameters[place].name, param, now or kept)
            for (index, place, param, now), kept in zip(rows, keeps, strict=True)
            # Of what is frozen for good, the flag may be off, by hand, though a reducer holds it.
            if not kept or trains_from(self._cells[index], clock)
        )
        for (index, place, param, now), kept in zip(rows, keeps, strict=True):
            if kept:
                self.flags.zero(param)
            else:
                free_gradients(param)
            # What was frozen before the plan came is not the plan's doing: no mark.
            rests = not now and not kept
            ours = rests and self._cells[index].parameters[place].requires_grad
            mark_frozen(self._places[index][place], "plan" if ours else None)
            if not now:
                param.grad = None
