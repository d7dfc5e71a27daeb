"""After a run: was what was announced also what was applied?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .rows import number
from .shown import Shown

#: relative to the largest lr of a group; float64 rounds at 1e-16
_TOLERANCE = 1e-12
#: what was applied: for each step a dict from group to lr (or to a dict with "lr", as
#: `optimizer.applied`), or for each group an array of lr by step
Applied = Sequence[Mapping[str, Any]] | Mapping[str, npt.ArrayLike]


@dataclass(frozen=True)
class Compared:
    """One group: how many steps were compared, and the largest deviation of lr and its step."""

    group: str
    steps: int
    deviation: float
    step: int | None
    agrees: bool


@dataclass(frozen=True)
class Confirmation:
    """The comparison of a whole run; prints as one line, or as a table if something deviates."""

    rows: tuple[Compared, ...]
    verdict: str
    agrees: bool

    def __str__(self) -> str:
        wrong = [row for row in self.rows if not row.agrees]
        width = max((len(row.group) for row in wrong), default=0)
        lines = [
            f"  {row.group:<{width}}  "
            + (f"deviates by {number(row.deviation)} at step {row.step}" if row.steps else "absent")
            for row in wrong
        ]
        return "\n".join([self.verdict, *lines])


def confirm(preview: Shown, applied: Applied, *, first: int = 0) -> Confirmation:
    """Compare the lr that was applied at every step with what the preview announced.

    Args:
        preview: of the run as it was built (with its feedback, if it had any).
        applied: for each step a dict from group to lr, or for each group an array of lr.
        first: the step at which the record begins, for a run that was resumed.

    Returns:
        One row for each group, and a verdict of one line.
    """
    series = _by_group(applied)
    steps = max((len(values) for values in series.values()), default=0)
    planned = preview.values(np.arange(first, first + steps))
    rows = [
        _compare(cell.name, planned.lr(index), series.pop(cell.name, np.empty(0)), first)
        for index, cell in enumerate(preview.resolved.cells)
    ]
    rows += [Compared(name, len(lr), float("inf"), first, False) for name, lr in series.items()]
    return _judged(preview, tuple(rows), steps, first)


def _by_group(applied: Applied) -> dict[str, npt.NDArray[np.float64]]:
    if isinstance(applied, Mapping):
        return {name: np.asarray(values, dtype=np.float64) for name, values in applied.items()}
    names = dict.fromkeys(name for record in applied for name in record)
    return {
        name: np.array([_lr(record.get(name)) for record in applied], dtype=np.float64)
        for name in names
    }


def _lr(value: Any) -> float:
    """Return an absent record is NaN, which agrees with nothing."""
    value = value.get("lr") if isinstance(value, Mapping) else value
    return float("nan") if value is None else float(value)


def _compare(
    name: str,
    planned: npt.NDArray[np.float64],
    applied: npt.NDArray[np.float64],
    first: int,
) -> Compared:
    if not len(applied):
        return Compared(name, 0, float("inf") if len(planned) else 0.0, None, not len(planned))
    planned = planned[: len(applied)]
    apart = np.abs(planned - applied)
    apart = np.where(np.isnan(apart), np.inf, apart)
    place = int(np.argmax(apart))
    agrees = bool(apart[place] <= _TOLERANCE * max(float(planned.max()), 0.0))
    return Compared(name, len(applied), float(apart[place]), first + place, agrees)


def _judged(preview: Shown, rows: tuple[Compared, ...], steps: int, first: int) -> Confirmation:
    total = preview.run.steps
    known = {cell.name for cell in preview.resolved.cells}
    wrong = [row for row in rows if not row.agrees]
    short = [row for row in rows if row.agrees and row.steps < steps]
    extent = f"{steps:,} steps, {len(known)} groups"
    if wrong or short:
        worst = max((*wrong, *short), key=lambda row: row.deviation)
        if worst.group not in known:
            cause = f"{worst.group!r} is not in the plan"
        elif worst in short or not worst.steps:
            cause = f"{worst.group!r} was recorded for {worst.steps:,} of {steps:,} steps"
        else:
            cause = f"{worst.group!r} deviates by {number(worst.deviation)} at step {worst.step}"
        many = len(wrong) + len(short)
        verdict = f"not applied as planned in {many} of {len(rows)} groups: {cause} ({extent})"
        return Confirmation(rows, verdict, False)
    largest = max((row.deviation for row in rows), default=0.0)
    verdict = f"applied as planned: {extent}, largest deviation {number(largest)}"
    if total is not None and first + steps != total:
        verdict += (
            f"; the plan was for {total:,} steps, the record covers {first} to {first + steps}"
        )
    return Confirmation(rows, verdict, True)
