"""Where to look at a long run: the peaks of every group, and the steps that must be drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..resolve.resolved import Cell
from ..schedules.base import EXACT, boundaries, steps_to_check
from .shown import Shown

#: at about this many steps a long run is drawn
SAMPLES = 2000
#: a long run is searched for peaks in blocks of so many steps, which stay in the CPU's cache
_BLOCK = 1 << 15


def peaks(preview: Shown) -> tuple[tuple[float, int], ...]:
    """Return the largest lr of each group over all steps, and the first step that has it.

    Of very long runs, over the steps that `steps_to_check` gives.
    """
    cells = preview.resolved.cells
    kinds = [lr_key(preview, cell) for cell in cells]
    owner: dict[Any, int] = {}  # groups with the same lr are searched once
    for index, kind in enumerate(kinds):
        owner.setdefault(kind, index)
    best = dict.fromkeys(owner.values(), (-1.0, 0))
    total = preview.run.steps or 0
    marks = _all_joints(preview) if total > EXACT else set[int]()
    steps = steps_to_check(total, marks).astype(np.int64)
    for begin in range(0, len(steps), _BLOCK):
        block = steps[begin : begin + _BLOCK]
        values = preview.values(block)
        for index, (peak, _) in best.items():
            lr = values.lr(index)
            place = int(np.argmax(lr))
            if lr[place] > peak:
                best[index] = (float(lr[place]), int(block[place]))
    return tuple(best[owner[kind]] for kind in kinds)


def lr_key(preview: Shown, cell: Cell) -> Any:
    """Return a key that two groups share only if their lr is the same at every step."""
    overridden = cell.name if cell.name in preview.feedback.overrides else None
    lr = dict(cell.hyper).get("lr")
    before = preview.resumed.before if preview.resumed is not None else None
    past = None if before is None else before.cell_of[cell.parameters[0].name]
    return lr, cell.schedule, cell.feedback, cell.rewarm, cell.windows, overridden, past


def sampled(preview: Shown) -> npt.NDArray[np.int64]:
    """Return the steps to draw; see `Preview.steps`."""
    steps = preview.run.steps
    if steps is None:
        spans = [windows(preview, cell) for cell in _all_cells(preview)]
        return np.array(sorted({0, *(begin for each in spans for begin, _ in each)}))
    if steps <= SAMPLES:
        return np.arange(steps)
    marks = {0, steps - 1, *(step for _, step in preview.peaks)}
    joints = _all_joints(preview)
    if preview.resumed is not None:
        joints |= {preview.resumed.clock}
    marks |= {step for joint in joints for step in (joint - 1, joint) if 0 <= step < steps}
    evenly = np.linspace(0, steps - 1, max(2, SAMPLES - len(marks))).astype(np.int64)
    return np.union1d(evenly, np.array(sorted(marks), dtype=np.int64))


def _all_cells(preview: Shown) -> list[Cell]:
    """Return the groups of the plan, of a resumed run also those of its past."""
    cells = list(preview.resolved.cells)
    if preview.resumed is not None and preview.resumed.before is not None:
        cells += preview.resumed.before.cells
    return cells


def _all_joints(preview: Shown) -> set[int]:
    """Return every step at which a group thaws or freezes, or one of its schedules turns."""
    found: set[int] = set()
    for cell in _all_cells(preview):
        found |= _joints(cell, windows(preview, cell))
    return found


def windows(preview: Shown, cell: Cell) -> list[tuple[int, int | None]]:
    """Return the windows of a cell that open within the run, those cut off at its end with None."""
    total = math.inf if preview.run.steps is None else preview.run.steps
    found: list[tuple[int, int | None]] = []
    for start, end in preview.feedback.windows(cell):
        if start < min(total, end):
            found.append((math.ceil(start), None if end >= total else int(end)))
    return found


def _joints(cell: Cell, spans: Iterable[tuple[int, int | None]]) -> set[int]:
    """Return the steps at which a cell thaws or freezes, or one of its schedules enters a phase."""
    curves = set() if cell.schedule is None else {cell.schedule}
    for _, given in cell.hyper:
        for part in given if isinstance(given, tuple) else (given,):
            curves.update(part.curves)
    found = {step for pair in spans for step in pair if step is not None}
    if cell.rewarm is not None:
        for begin in tuple(found):
            found |= boundaries(cell.rewarm, begin)
    return found.union(*(boundaries(curve, 0) for curve in curves))
