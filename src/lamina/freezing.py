"""Windows on a model: `requires_grad` and module modes follow them, and it can all be undone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .holding import Holder
from .parameters import Owned, mark_frozen
from .resolved import Cell

Groups = Sequence[dict[str, Any]]


class Freezer:
    """Sets `requires_grad` of the parameters of each cell, marked as the plan's doing.

    Under DDP, whose reducer is fixed when it wraps, parts that thaw later keep requires_grad on
    and only their gradients are dropped; so does everything in a model that is wrapped already.
    `toggles` says for each cell whether the flag is used.
    """

    def __init__(self, model: nn.Module, cells: Sequence[Cell], owned: Sequence[Owned]) -> None:
        by_name = {item.info.name: item for item in owned}
        reducer = has_reducer([item.tensor for item in owned])
        self.active: list[bool | None] = [None] * len(cells)
        wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
        self.toggles = [not reducer or not (cell.windows or wrapped) for cell in cells]
        self._keeps_on = reducer and not wrapped  # the flag, where it is not used
        self._cells = cells
        self._places = [[by_name[info.name].places for info in cell.parameters] for cell in cells]
        self._holder = Holder(model, owned)

    def follow(self, groups: Groups, active: Sequence[bool]) -> None:
        """Let each cell train or rest; what does not change is not touched."""
        changed = [i for i, now in enumerate(active) if now != self.active[i]]
        for index in changed:
            self._set(index, groups[index]["params"], active[index])
        self.active = list(active)
        if changed:
            self._hold(groups)

    def release(self, groups: Groups) -> None:
        """Give every parameter back the `requires_grad` it had before the plan, and its module."""
        for cell, places, group in zip(self._cells, self._places, groups, strict=True):
            for info, held_by, param in zip(cell.parameters, places, group["params"], strict=True):
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

    def _set(self, index: int, params: Sequence[torch.Tensor], active: bool) -> None:
        if not active:
            drop_gradients(params)
        if not self.toggles[index]:
            if self._keeps_on and (active or self.active[index] is None):
                for param in params:  # off before the build, or by hand since
                    param.requires_grad_(True)
            return
        rows = zip(self._cells[index].parameters, self._places[index], params, strict=True)
        for info, places, param in rows:
            param.requires_grad_(active)
            # What was frozen before the plan came is not the plan's doing: no mark.
            mark_frozen(places, not active and info.requires_grad)


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
