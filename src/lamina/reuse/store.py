"""Where stored outputs lie: in memory, up to a budget."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .shelf import OutputForm, Shelf

#: the call and the layout of the batches
Place = tuple[str, str]


class Store:
    """The shelves of a session.

    Args:
        memory: how many bytes they may take.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.used = 0
        self.shelves: dict[Place, Shelf] = {}

    def allocate(self, rows: int, width: int) -> torch.Tensor | None:
        """Return memory for some rows; None if the budget is used up."""
        size = rows * width
        if self.used + size > self.memory:
            return None
        self.used += size
        with torch.inference_mode(False):
            return torch.empty(rows, width, dtype=torch.uint8)

    def shelf(self, place: Place, form: OutputForm) -> Shelf:
        """Return a shelf, made if it is not there."""
        if place not in self.shelves:
            self.shelves[place] = Shelf(self, form)
        return self.shelves[place]

    def retain(self, wanted: Callable[[str], bool]) -> None:
        """Drop the shelves of all other calls."""
        for place in [place for place in self.shelves if not wanted(place[0])]:
            self.used -= self.shelves.pop(place).size
