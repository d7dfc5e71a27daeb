"""A preview as plain data, for records and reports."""

from __future__ import annotations

import numpy as np

from ..record.planned import ParameterEntry, Planned, PlannedGroup
from .header import header
from .shown import Shown

#: numbers of all curves together: those of many groups are sampled at fewer steps
_NUMBERS = 200_000
_FEWEST = 50


def planned_of(preview: Shown) -> Planned:
    """Return what a preview shows, without the plan and the model behind it."""
    rows, cells = preview.rows, preview.resolved.cells
    distinct = len({row.lr.tobytes() for row in rows})
    keep = _chosen(len(preview.steps), max(_FEWEST, _NUMBERS // max(1, distinct)))
    groups = tuple(
        PlannedGroup(
            name=row.group,
            optimizer=row.optimizer,
            thaw=row.thaw,
            gradients=row.gradients,
            lr=np.broadcast_to(np.asarray(row.lr, np.float64), preview.steps.shape)[keep],
            active=np.broadcast_to(np.asarray(row.active, bool), preview.steps.shape)[keep],
        )
        for row in rows
    )
    parameters = tuple(
        ParameterEntry(info.name, tuple(info.shape), cell.name, row.first is not None)
        for cell, row in zip(cells, rows, strict=True)
        for info in cell.parameters
    )
    return Planned(
        header=tuple(header(preview)),
        total=preview.run.steps,
        steps_per_epoch=preview.run.steps_per_epoch,
        steps=np.asarray(preview.steps, np.int64)[keep],
        groups=groups,
        parameters=parameters,
        findings=preview.findings,
    )


def _chosen(count: int, most: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the places of at most so many samples, evenly, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
