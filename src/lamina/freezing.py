"""Windows on a model: `requires_grad` follows them, and what a plan set can be undone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .parameters import Owned, mark_frozen
from .resolved import Cell


class Freezer:
    """Sets `requires_grad` of the parameters of each cell, marked as the plan's doing.

    Under DDP, whose reducer is fixed when it wraps, parts that thaw later keep requires_grad on
    and only their gradients are dropped; `toggles` says for each cell whether the flag is used.
    """

    def __init__(self, cells: Sequence[Cell], owned: dict[str, Owned], reducer: bool) -> None:
        self.toggles = [not reducer or not cell.windows for cell in cells]
        self._places = [[owned[info.name].places for info in cell.parameters] for cell in cells]
        self._user_frozen = [[not info.requires_grad for info in cell.parameters] for cell in cells]

    def set(self, index: int, params: Sequence[torch.Tensor], active: bool) -> None:
        """Let a cell train, or freeze it and drop its gradients."""
        if not active:
            drop_gradients(params)
        if not self.toggles[index]:
            return
        for param, places in zip(params, self._places[index], strict=True):
            param.requires_grad_(active)
            mark_frozen(places, not active)
        for places, users in zip(self._places[index], self._user_frozen[index], strict=True):
            if users:  # it was frozen before the plan came, so a later plan must see that
                mark_frozen(places, False)

    def release(self, groups: Sequence[Sequence[torch.Tensor]]) -> None:
        """Give every parameter back the `requires_grad` it had before the plan."""
        for index, params in enumerate(groups):
            rows = zip(params, self._places[index], self._user_frozen[index], strict=True)
            for param, places, users in rows:
                param.requires_grad_(not users)
                mark_frozen(places, False)


def drop_gradients(params: Sequence[torch.Tensor]) -> None:
    """Forget gradients that are left over from before a freeze, or computed in spite of it."""
    for param in params:
        param.grad = None
