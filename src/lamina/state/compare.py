"""Values at the clock of a saved run, compared with those that were saved."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from .._util.numbers import python_number
from ..algorithms.registry import is_whole_vector
from ..errors import TimeUnitError
from ..resolve.resolved import ALWAYS, Resolved
from ..resolve.timeline import Values
from ..schedules import Schedule
from ..schedules.duration import LONGEST, Run
from .entries import belongs, evaluations
from .match import Matched
from .report import Changed, settled_anew
from .schema import Entry, Saved, reading, short

#: a hyperparameter is not a tensor of more numbers than that
_FEW = 100
#: two values are one if they differ by no more than this part of them: by rounding
TOLERANCE = 1e-9


@reading("the saved hyperparameters")
def differences(
    saved: Saved, matched: Matched, resolved: Resolved, clock: int, values: Values
) -> tuple[Changed, ...]:
    """Return what is not as it was saved at the clock: hyperparameters by group, then thresholds.

    Args:
        saved: the state.
        matched: its entries under the names of the present parameters.
        resolved: the plan as it is now.
        clock: the steps taken.
        values: those of the plan at the clock.
    """
    found = _hyperparameters(resolved, matched.entries, values)
    planned = saved.settled_for
    if planned is None or not settled_anew(planned, resolved.settled_for):
        return found
    return (*found, *_operations(resolved, planned, clock, values))


def _operations(resolved: Resolved, planned: Run, clock: int, values: Values) -> Iterator[Changed]:
    """Return thresholds at the clock that this plan gives otherwise for the length that was saved.

    They are not in a state, which therefore cannot tell whether the plan itself is another.
    """
    for index, scope in enumerate(resolved.scopes):
        count = sum(len(cell.parameters) for cell in resolved.cells if cell.scope == index)
        for operation, now in values.operations(index):
            if not isinstance(operation.amount, Schedule):
                continue
            with suppress(TimeUnitError):  # epochs of an unknown length
                before = float(operation.amount.bind(planned)(clock))
                if not close(before, now):
                    kind = operation.source_name
                    yield Changed(scope.name, kind, before, now, count, moves=True)


def _hyperparameters(
    resolved: Resolved, entries: Mapping[str, Entry], values: Values
) -> tuple[Changed, ...]:
    rows: Counter[Changed] = Counter()
    for index, cell in enumerate(resolved.cells):
        hyper = values.hyper(index)
        own = [entries[info.name] for info in cell.parameters if info.name in entries]
        groups = [entry.group for entry in own if belongs(entry, cell)]
        counts = Counter(map(id, groups))
        timed = {key for key, _ in cell.moving}
        if cell.schedule is not None or cell.rewarm is not None or cell.windows != ALWAYS:
            timed.add("lr")
        if is_whole_vector(cell.optimizer):
            hyper = {**hyper, "max_eval": evaluations(hyper)}
        for group in {id(group): group for group in groups}.values():
            for key in hyper.keys() & group.keys():
                saved, now = _plain(_given(group, key)), _plain(hyper[key])
                if not close(saved, now):
                    row = Changed(cell.name, key, saved, now, moves=key in timed)
                    rows[row] += counts[id(group)]
    found = [replace(row, parameters=count) for row, count in rows.items()]
    order = {cell.name: place for place, cell in enumerate(resolved.cells)}
    return tuple(sorted(found, key=lambda row: (order[row.group], row.key != "lr", row.key)))


def _given(group: Mapping[str, Any], key: str) -> Any:
    written = key == "max_eval" and group[key] is None and type(group.get("max_iter")) is int
    return evaluations(group) if written else group[key]


def _plain(value: Any) -> Any:
    """Return a value that can be compared and shown; the text of one that cannot."""
    if isinstance(value, torch.Tensor) and 0 < value.numel() <= _FEW and not value.is_meta:
        return _plain(value.item() if value.numel() == 1 else value.reshape(-1).tolist())
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    value = python_number(value)
    if isinstance(value, (bool, float, str, type(None))):
        return value
    whole = isinstance(value, int) and abs(value) <= LONGEST
    return value if whole else short(value)


def close(a: Any, b: Any) -> bool:
    """Return whether two values are the same but for rounding."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=TOLERANCE)
    return bool(a == b)
