"""The charts of a report as data that the script of the page draws."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .._util.numbers import where_positive
from ..record.record import METRICS
from ..record.series import Floats, Steps, thin
from .html import plain
from .source import Source

#: points of all curves of one chart together, and of one curve at least and at most
_POINTS, _FEWEST, _MOST = 40_000, 60, 1_500
#: peaks further apart than this are drawn on a logarithmic axis
_LOG_RATIO = 20.0
#: rows and columns of a heat map
_ROWS, _COLUMNS = 200, 120
#: vertical lines in a chart
_MARKS = 60
#: metrics that get a chart of their own
_METRICS = 12

Curve = tuple[Steps, Floats]
Chart = dict[str, Any]


def points(curve: Curve, budget: int) -> dict[str, Any]:
    """Return a curve as lists, thinned to about so many points; gaps are null."""
    steps, values = thin(*curve, budget)
    return {"x": steps.tolist(), "y": [plain(value) for value in values.tolist()]}


def lines(
    chart: str, title: str, curves: Sequence[tuple[dict[str, Any], Curve]], log: bool | None = None
) -> Chart | None:
    """Return a chart of curves over the steps, or None if there is nothing to draw.

    Args:
        chart: its name in the page.
        title: of the vertical axis.
        curves: each with its look (group, name, dash, width) and its points.
        log: whether the axis is logarithmic; by default, if the curves are far apart.
    """
    known = [(look, curve) for look, curve in curves if np.isfinite(curve[1]).any()]
    if not known:
        return None
    budget = min(_MOST, max(_FEWEST, _POINTS // len(known)))
    traces = [{**look, **points(curve, budget)} for look, curve in known]
    log = _far_apart([curve[1] for _, curve in known]) if log is None else log
    return {"id": chart, "kind": "lines", "yTitle": title, "log": log, "traces": traces}


def _far_apart(curves: Iterable[Floats]) -> bool:
    peaks = [float(values[np.isfinite(values)].max()) for values in curves]
    positive = [peak for peak in peaks if peak > 0]
    return bool(positive) and max(positive) > _LOG_RATIO * min(positive)


def lr_chart(source: Source) -> Chart | None:
    """Return lr by group, planned and applied."""
    recorded = source.record.last_step is not None
    curves = []
    for group in source.drawn:
        look = {"group": source.groups.index(group), "width": 2}
        if recorded:
            planned = {**look, "name": "planned", "dash": "dot", "width": 1.5}
            curves.append(({**look, "name": "applied"}, _positive(source.actual(group, "lr"))))
        else:
            planned = {**look, "name": "planned"}
        curves.append((planned, _positive(source.planned_lr(group))))
    return lines("lr", "learning rate", curves)


def _positive(curve: Curve) -> Curve:
    steps, values = curve
    return steps, where_positive(values)


def group_chart(source: Source, chart: str, title: str, name: str) -> Chart | None:
    """Return one measured value of each group on a logarithmic axis."""
    curves = [
        (
            {"group": source.groups.index(group), "name": title, "width": 1.5},
            _positive(source.actual(group, name)),
        )
        for group in source.drawn
    ]
    return lines(chart, title, curves, log=True)


def scope_chart(source: Source) -> Chart | None:
    """Return the factor by which clipping multiplied the gradients, once where groups share it."""
    known = [(group, source.actual(group, "clip")) for group in source.drawn]
    known.sort(key=lambda row: len(row[1][0]), reverse=True)  # the longest stands for the others
    kept: list[tuple[str, Curve]] = []
    for group, curve in known:
        if len(curve[0]) and not any(_agree(curve, other) for _, other in kept):
            kept.append((group, curve))
    looks: list[dict[str, Any]] = [{"group": source.groups.index(group)} for group, _ in kept]
    if len(looks) == 1:  # one norm over all: no group's own
        looks = [{}]
    curves = [
        ({**look, "name": "clip factor", "width": 1.5}, curve)
        for look, (_, curve) in zip(looks, kept, strict=True)
    ]
    return lines("clip", "clip factor", curves, log=False)


def _agree(one: Curve, other: Curve) -> bool:
    """Return whether two curves are the same at all steps that they share."""
    shared, mine, its = np.intersect1d(one[0], other[0], return_indices=True)
    return bool(len(shared)) and bool(np.array_equal(one[1][mine], other[1][its]))


def norm_chart(source: Source) -> Chart | None:
    """Return the norm of each clip scope, before clipping."""
    curves = [
        ({"name": scope, "colour": place, "width": 1.5}, source.actual(METRICS, f"norm/{scope}"))
        for place, scope in enumerate(source.scopes[:_METRICS])
    ]
    return lines("scopes", "norm before clipping", curves, log=True)


def metric_charts(source: Source) -> list[Chart]:
    """Return a chart for each metric, of training and validation together."""
    families: dict[str, list[str]] = {}
    for name in source.metric_names:
        families.setdefault(name.removeprefix("val_"), []).append(name)
    found = []
    for place, (family, names) in enumerate(list(families.items())[:_METRICS]):
        curves = []
        for name in names:
            held_out = name.startswith("val_")
            look = {"name": name, "colour": 1 if held_out else 0, "markers": held_out}
            curves.append(({**look, "width": 2 if held_out else 1.2}, source.actual(METRICS, name)))
        chart = lines(f"metric-{place}", family, curves, log=False)
        if chart is not None:
            found.append(chart)
    return found


def heat_map(source: Source) -> Chart | None:
    """Return the ratio of update to weight, by group and span of steps, as powers of ten.

    Where layers were measured, and are more than the groups, a row is a layer.
    """
    known = [group for group in source.groups if len(source.actual(group, "ratio")[0])]
    layers = source.layers if len(source.layers) > len(known) else ()
    if layers:
        series = [source.actual(METRICS, f"ratio/{layer}") for layer in layers]
    else:
        if len(known) > _ROWS:
            places = np.unique(np.linspace(0, len(known) - 1, _ROWS).astype(int))
            known = [known[place] for place in places]
        series = [source.actual(group, "ratio") for group in known]
    if not series:
        return None
    first = min(int(steps[0]) for steps, _ in series)
    last = max(int(steps[-1]) for steps, _ in series)
    every = np.unique(np.concatenate([steps for steps, _ in series]))
    if len(every) <= _COLUMNS:  # a column for each step that was measured, up to the next
        edges = np.append(every, last + 1).astype(float)
    else:
        edges = np.linspace(first, last + 1, _COLUMNS + 1)
    rows = [_binned(*curve, edges) for curve in series]
    return {
        "id": "updates",
        "kind": "heat",
        # Rows of groups are hidden with these; layers have no group.
        "groups": [-1] * len(layers) or [source.groups.index(group) for group in known],
        "rows": list(layers or known),
        "x": [round(float(edge), 1) for edge in (edges[:-1] + edges[1:]) / 2],
        "edges": [round(float(edge), 1) for edge in edges],
        "from": np.ceil(edges[:-1]).astype(int).tolist(),
        "to": (np.ceil(edges[1:]).astype(int) - 1).tolist(),
        "z": rows,
    }


def _binned(steps: Steps, values: Floats, edges: Floats) -> list[float | None]:
    """Return log10 of the largest value in each span of steps; None where there is none."""
    place = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, len(edges) - 2)
    best = np.full(len(edges) - 1, -np.inf)
    usable = np.isfinite(values) & (values > 0)
    np.maximum.at(best, place[usable], np.log10(values[usable]))
    return [plain(value) for value in best.tolist()]


def marks(source: Source) -> list[dict[str, Any]]:
    """Return vertical lines for thaws, freezes and other events, few enough to be told apart."""
    kinds = {"thaw", "freeze"}
    found: dict[tuple[int, str], str] = {}
    for event in source.record.events:
        label = event.kind if event.kind in kinds else f"{event.kind}: {event.text}"
        found.setdefault((event.step, event.kind), label[:160])
    chosen = list(found.items())
    if len(chosen) > _MARKS:
        places = np.unique(np.linspace(0, len(chosen) - 1, _MARKS).astype(int))
        chosen = [chosen[place] for place in places]
    return [{"x": step, "kind": kind, "text": label} for (step, kind), label in chosen]
