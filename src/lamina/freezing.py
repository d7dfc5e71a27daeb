"""Windows on a model: `requires_grad` and module modes follow them, and it can all be undone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .holding import Holder
from .parameters import Owned, mark_frozen
from .reducers import (
    MAY_BE_WRAPPED,
    FlagKeeper,
    free_gradients,
    has_zero_gradients,
    trains_from,
)
from .resolved import Cell
from .sharding import is_sharded

Groups = Sequence[dict[str, Any]]


class Freezer:
    """Sets `requires_grad` of the parameters of each cell, marked as the plan's doing.

    What a DDP reducer holds keeps the flag on (see `FlagKeeper`).
    """

    def __init__(self, model: nn.Module, cells: Sequence[Cell], owned: Sequence[Owned]) -> None:
        by_name = {item.info.name: item for item in owned}
        self.active: list[bool | None] = [None] * len(cells)
        self.flags = FlagKeeper(model, cells)
        self._cells = cells
        self._places = [[by_name[info.name].places for info in cell.parameters] for cell in cells]
        self._holder = Holder(model, owned)

    def follow(self, groups: Groups, active: Sequence[bool], clock: int) -> None:
        """Let each cell train or rest; what does not change is not touched.

        Args:
            groups: the parameter groups, one for each cell.
            active: whether each trains in the step that comes next.
            clock: the number of that step.

        Raises:
            PlanError: if what must train is not reduced by DDP; no flag was changed.
        """
        changed = [i for i, now in enumerate(active) if now != self.active[i]]
        if changed:
            self.flags.measure(groups, clock, in_step=self.flags.settled)
        for index in changed:
            self._set(index, groups[index]["params"], active[index], clock)
        self.active = list(active)
        if changed:
            self._hold(groups)

    def settle(self, groups: Groups, clock: int) -> None:
        """Look once more in the first step: the model may have been wrapped since the build.

        Raises:
            PlanError: if what must train is not reduced by DDP; nothing was changed.
        """
        self.flags.measure(groups, clock, in_step=True)
        for index, (cell, group) in enumerate(zip(self._cells, groups, strict=True)):
            for place, param in enumerate(() if self.active[index] else group["params"]):
                keeps = self.flags.keeps(cell, param, clock)
                zeroed = has_zero_gradients(param)
                # What FSDP2 made of a parameter has its flag, and not its hook.
                if keeps != zeroed or (is_sharded(param) and param.requires_grad):
                    self._rest(index, place, param, clock)

    def keeps_for_wrapping(self, groups: Groups, clock: int) -> bool:
        """Return whether a frozen parameter keeps the flag only because DDP may yet wrap it."""
        rows = zip(self._cells, groups, self.active, strict=True)
        resting = (
            (cell, param) for cell, group, now in rows if not now for param in group["params"]
        )
        return any(self.flags.reason(*each, clock) == MAY_BE_WRAPPED for each in resting)

    def release(self, groups: Groups) -> None:
        """Give every parameter back the `requires_grad` it had before the plan, and its module."""
        for cell, places, group in zip(self._cells, self._places, groups, strict=True):
            for info, held_by, param in zip(cell.parameters, places, group["params"], strict=True):
                free_gradients(param)
                param.requires_grad_(info.requires_grad)
                mark_frozen(held_by, False)
        self._holder.release()

    def _hold(self, groups: Groups) -> None:
        rest: list[str] = []
        by_hand: list[str] = []  # since the build, which set the flag of all that trains
        for cell, group, now in zip(self._cells, groups, self.active, strict=True):
            if not now:
                rest += [info.name for info in cell.parameters if cell.hold]
                continue
            pairs = zip(cell.parameters, group["params"], strict=True)
            by_hand += [info.name for info, param in pairs if not param.requires_grad]
        self._holder.follow(rest, by_hand)

    def _set(self, index: int, params: Sequence[torch.Tensor], active: bool, clock: int) -> None:
        if not active:
            drop_gradients(params)
        for place, param in enumerate(params):
            if active:
                free_gradients(param)
                param.requires_grad_(True)
                mark_frozen(self._places[index][place], False)
            else:
                self._rest(index, place, param, clock)

    def _rest(self, index: int, place: int, param: torch.Tensor, clock: int) -> None:
        """Turn the flag of a frozen parameter off, or keep its gradients at zero."""
        cell = self._cells[index]
        keeps = self.flags.keeps(cell, param, clock)
        # Of what is frozen for good, the flag may be off, by hand, though a reducer holds it.
        if not keeps or trains_from(cell, clock):
            param.requires_grad_(keeps)
        if keeps:
            self.flags.zero(param)
        else:
            free_gradients(param)
        # What was frozen before the plan came is not the plan's doing: no mark.
        mark_frozen(self._places[index][place], not keeps and cell.parameters[place].requires_grad)


def drop_gradients(params: Sequence[torch.Tensor]) -> None:
    """Forget gradients that are left over from before a freeze, or computed in spite of it."""
    for param in params:
        param.grad = None
