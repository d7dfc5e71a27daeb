"""The tables behind the charts: what they show, for reading and for screen readers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..preview.rows import number
from ..record.record import METRICS
from ..record.series import Floats
from .html import name, table, text
from .source import Source

#: rows of a table of groups; more are said to be left out
_ROWS = 1000
_EXTREMES = ("lowest", "median", "highest", "last")
_EVENTS = 500


def lr_table(source: Source) -> str:
    """Return the lr of each group: planned, applied, and how far they are apart."""
    rows = []
    for group in source.groups[:_ROWS]:
        planned, applied = source.planned_lr(group)[1], source.actual(group, "lr")[1]
        cells = [_span(planned), _span(np.where(applied == 0, np.nan, applied))]
        rows.append([name(group), *cells, _difference(source, group)])
    head = [
        "group",
        "planned: first, peak, last",
        "applied: first, peak, last",
        "largest difference",
    ]
    return table("Learning rate by group", head, rows) + _more(source)


def measured_table(source: Source, key: str, title: str) -> str:
    """Return the median and the extremes of a measured value of each group."""
    curves = [(group, source.actual(group, key)[1]) for group in source.groups[:_ROWS]]
    return table(title, ["group", *_EXTREMES], _extremes(curves)) + _more(source)


def layer_table(source: Source) -> str:
    """Return the median and the extremes of the ratio of update to weight of each layer."""
    layers = source.layers[:_ROWS]
    rows = _extremes([(layer, source.actual(METRICS, f"ratio/{layer}")[1]) for layer in layers])
    return table("Update over weight by layer", ["layer", *_EXTREMES], rows) if rows else ""


def _extremes(curves: Sequence[tuple[str, Floats]]) -> list[list[str]]:
    """Return a row for each curve that has values."""
    rows = []
    for label, values in curves:
        finite = values[np.isfinite(values)]
        if len(finite):
            numbers = (finite.min(), np.median(finite), finite.max(), finite[-1])
            rows.append([name(label), *(number(float(value)) for value in numbers)])
        elif len(values):
            rows.append([name(label), "not finite", "", "", ""])
    return rows


def scope_table(source: Source) -> str:
    """Return the norms of the clip scopes."""
    rows = []
    for scope in source.scopes[:_ROWS]:
        values = source.actual(METRICS, f"norm/{scope}")[1]
        finite = values[np.isfinite(values)]
        cells = (finite.min(), np.median(finite), finite.max()) if len(finite) else ()
        rows.append([name(scope), *(number(float(value)) for value in cells)])
    return table("Norm before clipping", ["rule", "lowest", "median", "highest"], rows)


def metric_table(source: Source) -> str:
    """Return where each metric began, was best and ended."""
    rows = []
    for metric in source.metric_names[:_ROWS]:
        steps, values = source.actual(METRICS, metric)
        finite = np.isfinite(values)
        if not finite.any():
            rows.append([name(metric), "not finite", "", "", ""])
            continue
        known, places = values[finite], steps[finite]
        low, high = int(known.argmin()), int(known.argmax())
        cells = [number(float(known[0]))]
        cells += [f"{number(float(known[p]))} (step {places[p]})" for p in (low, high)]
        rows.append([name(metric), *cells, number(float(known[-1]))])
    return table("Metrics", ["metric", "first", "lowest", "highest", "last"], rows)


def event_table(source: Source) -> str:
    """Return the events in the order in which they happened."""
    events = source.record.events
    rows = [[str(e.step), text(e.kind), text(e.text)] for e in events[:_EVENTS]]
    left_out = len(events) - len(rows) + source.record.dropped_events
    more = f"<p>{left_out:,} more events are not listed.</p>" if left_out else ""
    return table("Events", ["step", "kind", "what happened"], rows, first_is_name=False) + more


def _more(source: Source) -> str:
    left_out = len(source.groups) - _ROWS
    return f"<p>{left_out:,} more groups are not listed.</p>" if left_out > 0 else ""


def _span(values: Floats) -> str:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "–"
    numbers: Sequence[float] = (finite[0], finite.max(), finite[-1])
    return ", ".join(number(float(value)) for value in numbers)


def _difference(source: Source, group: str) -> str:
    """Return how far applied and planned lr are apart at the steps at which both are known."""
    steps, lr = source.actual(group, "lr")
    plan = source.plan_of.get(group)
    if plan is None or source.planned is None or not len(steps):
        return "–"
    both, mine, its = np.intersect1d(steps, source.planned.steps, return_indices=True)
    if not len(both):
        return "–"
    wanted = np.where(plan.active, plan.lr, 0.0)[its]
    apart = np.abs(lr[mine] - wanted)
    apart[~np.isfinite(apart)] = np.inf
    # A saved plan has seven digits of each number.
    if apart.max() <= 1e-6 * max(float(np.abs(wanted).max()), 1e-30):
        return "none"
    worst = int(apart.argmax())
    return f"{number(float(apart[worst]))} at step {both[worst]}"
