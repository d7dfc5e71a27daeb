"""One row for each parameter group: what the table, the picture and other reports show."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..algorithms.registry import optimizer_name
from ..gradients.operations import Operation
from ..resolve.resolved import Cell, Trigger
from ..resolve.timeline import Values
from .sampling import windows
from .shown import Row, Shown

Floats = npt.NDArray[np.float64]


def number(value: float | None) -> str:
    """Return a number as people write it: three digits, `2e-5` rather than `2e-05`."""
    if value is None:
        return "–"
    if 0 < abs(value) < 9.995e-4:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def span(start: float | None, end: float | None) -> str:
    """Return a number, or where one begins and ends."""
    return number(start) if start == end or end is None else f"{number(start)} → {number(end)}"


def epochs(steps: int, per_epoch: int) -> str:
    """Return steps as epochs, to two decimals."""
    return f"{steps / per_epoch:.2f}".rstrip("0").rstrip(".")


def rows(preview: Shown) -> tuple[Row, ...]:
    """Return the rows of a preview."""
    values = preview.values(preview.steps)
    return tuple(_row(preview, values, index) for index in range(len(preview.resolved.cells)))


def _row(preview: Shown, values: Values, index: int) -> Row:
    cell = preview.resolved.cells[index]
    total, spans = preview.run.steps, windows(preview, cell)
    first = spans[0][0] if spans else None
    last = None
    if spans and total is not None:
        end = spans[-1][1]
        last = (total if end is None else end) - 1
    hyper = values.hyper(index)

    def at(value: Any, step: int | None) -> float | None:
        if step is None or value is None:
            return None
        series = np.broadcast_to(np.asarray(value, dtype=np.float64), preview.steps.shape)
        return float(series[np.searchsorted(preview.steps, step)])

    scope = None if first is None else cell.scope
    operations = [] if scope is None else values.operations(scope)
    return Row(
        group=cell.name,
        optimizer=optimizer_name(cell.optimizer),
        rules=cell.rules,
        tensors=len(cell.parameters),
        parameters=cell.numel,
        lr_start=at(hyper["lr"], first),
        lr_peak=None if last is None else preview.peaks[index][0],
        lr_end=at(hyper["lr"], last),
        weight_decay=at(hyper.get("weight_decay"), first),
        weight_decay_end=at(hyper.get("weight_decay"), last),
        gradients=", ".join(
            _operation_text(operation, at(amount, first), at(amount, last))
            for operation, amount in operations
        ),
        scope=None if scope is None else preview.resolved.scopes[scope].name,
        thaw=_thaw_text(preview, cell, spans),
        first=first,
        last=last,
        ties=tuple(info.names for info in cell.parameters if len(info.names) > 1),
        lr=hyper["lr"],
        active=values.active(index),
    )


def _operation_text(operation: Operation, start: float | None, end: float | None) -> str:
    """Describe a gradient operation with its number as it moves."""
    plain = repr(operation) == f"{operation.source_name}({operation.amount!r})"
    return f"{operation.source_name} {span(start, end)}" if plain else repr(operation)


def _thaw_text(preview: Shown, cell: Cell, spans: list[tuple[int, int | None]]) -> str:
    """Return when a cell trains, in words."""
    if not spans:
        waits = [b.reaction.metric for b, _ in cell.windows if isinstance(b, Trigger)]
        if waits:
            return f"when {waits[0]} stalls"
        return f"never (step {cell.windows[0][0]})" if cell.windows else "frozen"
    per = preview.run.steps_per_epoch

    def when(step: int) -> str:
        return f"{step} (epoch {epochs(step, per)})" if per else str(step)

    def text(begin: int, end: int | None) -> str:
        if end is not None:
            return f"until step {when(end)}" if begin == 0 else f"steps {begin} to {end - 1}"
        return "trains" if begin == 0 else f"step {when(begin)}"

    texts = [text(begin, end) for begin, end in spans]
    dropped = cell.frozen_state == "drop" and any(end is not None for _, end in spans)
    return ", then ".join(texts) + (", state dropped" if dropped else "")
