"""The plans in force in this process: which of them train or freeze the same parameters."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import PlanError
from ..resolve.resolved import Cell, Resolved
from ..resolve.timeline import Feedback
from ..resolve.windows import window_text


class Claim:
    """What the plan of one optimizer says on its parameters, for the other optimizers to see.

    It is in force from `enter` until `leave`, or until the optimizer is garbage-collected: the
    registry holds it weakly. Copies and pickles of an optimizer in force are in force too.

    Args:
        resolved: the plan of the optimizer.
        groups: its parameter groups, whose dicts stay the same ones.
    """

    def __init__(self, resolved: Resolved, groups: Sequence[Mapping[str, Any]]) -> None:
        self._cells = resolved.cells
        self._steps = resolved.run.steps
        self._groups = list(groups)
        #: the steps taken by an optimizer that this one replaces, whose state it did not take over
        self.lost_steps = 0

    def enter(self, *, resumed: bool) -> None:
        """Put the plan in force.

        A run that resumes, or that comes after one that has reached its end, takes over from it.

        Args:
            resumed: whether a saved state is loaded.

        Raises:
            PlanError: if a plan in force freezes what this one trains, or the reverse.
        """
        for other in () if resumed else self._others():
            if other._is_over:
                continue
            shared = self._shared(other)
            for mine, theirs, name in shared:
                # The same windows are those of a plan that is built again, at whatever step.
                if mine.windows != theirs.windows and self._ahead(mine) != other._ahead(theirs):
                    raise PlanError(
                        f"by this plan {name!r} {_said(mine)}, but by the plan of another "
                        "optimizer, which was built for this model before and is still in use, it "
                        f"{_said(theirs)}. Call release() on that optimizer first if this one "
                        "replaces it. For two optimizers side by side, build each for its own part "
                        "of the model, such as plan.build(model.generator)."
                    )
            if any(mine.windows and theirs.windows for mine, theirs, _ in shared):
                self.lost_steps = max(self.lost_steps, other._clock)
        _IN_FORCE.add(self)

    def leave(self) -> None:
        """End the plan's say."""
        _IN_FORCE.discard(self)

    def trained_elsewhere(self) -> frozenset[int]:
        """Return the ids of the parameters that another plan in force trains in its next step."""
        return frozenset(
            at for other in self._others() for cell, at, _ in other._rows() if other._trains(cell)
        )

    def governed_elsewhere(self) -> frozenset[int]:
        """Return the ids of the parameters that another plan in force trains or freezes."""
        return frozenset(at for other in self._others() for _, at, _ in other._rows())

    def _others(self) -> list[Claim]:
        return [other for other in _IN_FORCE if other is not self]

    def _cells_by_id(self) -> dict[int, Cell]:
        """Return the cell of each parameter that the plan speaks of."""
        return {at: cell for cell, at, _ in self._rows()}

    def _shared(self, other: Claim) -> list[tuple[Cell, Cell, str]]:
        theirs = other._cells_by_id()
        return [(cell, theirs[at], name) for cell, at, name in self._rows() if at in theirs]

    def _rows(self) -> Iterator[tuple[Cell, int, str]]:
        """Yield each parameter that the plan speaks of: its cell, id and name."""
        for cell, group in zip(self._cells, self._groups, strict=True):
            if not cell.by_model:
                # Not strict: a group that DeepSpeed has emptied must not harm the next plan.
                for param, name in zip(group["params"], group["param_names"], strict=False):
                    yield cell, id(param), name

    @property
    def _clock(self) -> int:
        return int(self._groups[0]["clock"])

    @property
    def _is_over(self) -> bool:
        return self._steps is not None and self._clock >= self._steps

    def _trains(self, cell: Cell) -> bool:
        return any(begin <= self._clock < end for begin, end in self._windows(cell))

    def _windows(self, cell: Cell) -> list[tuple[float, float]]:
        return Feedback(seen=self._groups[0]["feedback"]).windows(cell)

    def _ahead(self, cell: Cell) -> list[tuple[Any, float]]:
        """Return the windows from now on, counted from now."""
        now = self._clock
        pairs = zip(cell.windows, self._windows(cell), strict=True)
        return [
            (given if begin == float("inf") else max(begin - now, 0), end - now)
            for (given, _), (begin, end) in pairs
            if end > now
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "in force": self in _IN_FORCE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        in_force = state.pop("in force")
        self.__dict__.update(state)
        if in_force:
            _IN_FORCE.add(self)


_IN_FORCE: weakref.WeakSet[Claim] = weakref.WeakSet()


def _said(cell: Cell) -> str:
    text = window_text(cell.windows)
    return text if text.startswith("trains") else f"is {text}"
