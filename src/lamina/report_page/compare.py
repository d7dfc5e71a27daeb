"""Two runs side by side: settings, plans, learning rates, metrics."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..preview.rows import number
from ..record.record import METRICS
from .charts import lines
from .colours import FROZEN
from .html import folded, name, table, text
from .page import card, chart_place, write_page
from .source import DRAWN, Source

Row = tuple[str, str, str]
_MISSING = "–"


@dataclass(frozen=True)
class Compared:
    """One run of a comparison.

    Args:
        label: what it is called.
        source: what it recorded and planned.
        settings: its settings, by name.
        plan: the text of its plan.
    """

    label: str
    source: Source
    settings: Mapping[str, str]
    plan: str


@dataclass(frozen=True)
class Comparison:
    """What differs between two runs, as texts.

    `settings` holds those that differ, `plan` the lines of a unified diff, `lr` the peak and the
    last lr of each group where they differ, `metrics` the last and the best value of each.
    """

    labels: tuple[str, str]
    settings: tuple[Row, ...]
    plan: tuple[str, ...]
    lr: tuple[Row, ...]
    metrics: tuple[Row, ...]

    def __str__(self) -> str:
        parts = [
            _text_table("settings", self.labels, self.settings, "the settings are the same"),
            "\n".join(["plan", *self.plan]) if self.plan else "the plans are the same",
            _text_table("lr: peak → last", self.labels, self.lr, "the lr is the same"),
            _text_table("metric: last (best)", self.labels, self.metrics, "no metrics"),
        ]
        return "\n\n".join(parts)


def compare(left: Compared, right: Compared) -> Comparison:
    """Return what differs between two runs."""
    settings = [
        (key, left.settings.get(key, _MISSING), right.settings.get(key, _MISSING))
        for key in dict.fromkeys([*left.settings, *right.settings])
    ]
    old, new = left.plan.splitlines(), right.plan.splitlines()
    diff = list(difflib.unified_diff(old, new, left.label, right.label, lineterm=""))
    if not old and not new:
        diff = ["neither run has a plan"]
    lr = [
        (pair.label, _lr_text(left.source, pair.left), _lr_text(right.source, pair.right))
        for pair in pairs_of(left.source, right.source)
    ]
    metrics = dict.fromkeys([*left.source.metric_names, *right.source.metric_names])
    return Comparison(
        (left.label, right.label),
        tuple(row for row in settings if row[1] != row[2]),
        tuple(diff),
        tuple(row for row in lr if row[1] != row[2]),
        tuple(
            (metric, _metric_text(left.source, metric), _metric_text(right.source, metric))
            for metric in metrics
        ),
    )


@dataclass(frozen=True)
class Pair:
    """A group of one run and that of the other which has the same parameters, or some of them."""

    label: str
    left: str | None
    right: str | None


def pairs_of(left: Source, right: Source) -> list[Pair]:
    """Return the groups of two runs that belong together, by their parameters.

    Plans may cut one model into different groups. Where the parameters of a run are not known,
    groups are matched by name.
    """
    groups = [{entry.name: entry.group for entry in run.entries} for run in (left, right)]
    if all(groups):
        names = dict.fromkeys([*groups[0], *groups[1]])
        found = dict.fromkeys((groups[0].get(name), groups[1].get(name)) for name in names)
    else:
        known = dict.fromkeys([*left.groups, *right.groups])
        found = dict.fromkeys(
            (
                group if group in left.groups else None,
                group if group in right.groups else None,
            )
            for group in known
        )
    pairs, taken = [], set[str]()
    for one, other in found:
        label = min((group for group in (one, other) if group is not None), key=len, default="")
        if label in taken:
            label = f"{one} / {other}"
        taken.add(label)
        pairs.append(Pair(label, one, other))
    return pairs


def _lr_text(source: Source, group: str | None) -> str:
    if group is None or group not in source.groups:
        return _MISSING
    peak, values = source.peaks[group], source.actual(group, "lr")[1]
    if peak is None:
        return "frozen"
    return number(peak) + (f" → {number(float(values[-1]))}" if len(values) else "")


def _metric_text(source: Source, metric: str) -> str:
    steps, values = source.actual(METRICS, metric)
    finite = np.isfinite(values)
    if not len(values):
        return _MISSING
    if not finite.any():
        return "not finite"
    known, places = values[finite], steps[finite]
    falls = "loss" in metric or "error" in metric or "perplexity" in metric
    best = int(known.argmin() if falls else known.argmax())
    return f"{number(float(values[-1]))} ({number(float(known[best]))} at step {places[best]})"


def _text_table(title: str, labels: tuple[str, str], rows: Sequence[Row], none: str) -> str:
    if not rows:
        return none
    lines_ = [(title, *labels), *rows]
    first, second = (max(len(row[column]) for row in lines_) for column in (0, 1))
    return "\n".join(f"{a:<{first}}  {b:<{second}}  {c}".rstrip() for a, b, c in lines_)


# --- the page ------------------------------------------------------------------------------------


def write_comparison(left: Compared, right: Compared, path: str | os.PathLike[str]) -> None:
    """Write the comparison of two runs as one HTML file, which works without a network.

    Raises:
        MissingExtraError: if plotly is not installed.
        LaminaError: if the file cannot be written; what was there stays.
    """
    found, charts = compare(left, right), _charts(left, right)
    first, second = found.labels
    parts: list[tuple[str, str, str]] = []
    metrics = [chart for chart in charts if chart["id"] != "lr"]
    if found.metrics:
        figures = "".join(chart_place(c, f"{c['yTitle']} of both runs") for c in metrics)
        rows = _table("Metrics: last (best)", "metric", found.labels, found.metrics)
        parts.append(("metrics", "Loss and metrics", f'<div class="grid">{figures}</div>{rows}'))
    figures = "".join(
        chart_place(chart, "Learning rate of both runs") for chart in charts if chart["id"] == "lr"
    )
    rows = "<p>The lr of all groups is the same.</p>"
    if found.lr:
        rows = folded("Table", _table("lr: peak → last", "group", found.labels, found.lr))
    hint = f'<p class="hint">Solid: {text(first)}. Dotted: {text(second)}.</p>'
    parts.append(("lr", "Learning rate", hint + figures + rows))
    parts.append(("plan", "Plan", _diff(found.plan)))
    same = "<p>The settings are the same.</p>"
    rows = _table("Settings that differ", "setting", found.labels, found.settings)
    parts.append(("facts", "Settings", rows if found.settings else same))
    links = "".join(f'<a href="#{key}">{text(title)}</a>' for key, title, _ in parts)
    body = f'<nav aria-label="Parts of the page">{links}</nav>'
    body += "".join(card(*part) for part in parts)
    title = f"{first} and {second}"
    colours = {
        pair.label: _colour(pair, left.source, right.source)
        for pair in pairs_of(left.source, right.source)
    }
    write_page(Path(path), title, "<p>Two runs side by side.</p>", body, charts, [], colours)


def _colour(pair: Pair, left: Source, right: Source) -> str:
    if pair.left is not None and pair.left in left.colours:
        return left.colours[pair.left]
    return right.colours.get(pair.right or "", FROZEN)


def _charts(left: Compared, right: Compared) -> list[dict[str, Any]]:
    curves = []
    pairs = list(enumerate(pairs_of(left.source, right.source)))
    training = [(place, pair) for place, pair in pairs if _trains(pair, left.source, right.source)]
    for place, pair in training[:DRAWN]:
        for run, group, dash in ((left, pair.left, "solid"), (right, pair.right, "dot")):
            if group is not None:
                steps, lr = run.source.actual(group, "lr")
                look = {"group": place, "name": run.label, "dash": dash, "width": 2}
                curves.append((look, (steps, np.where(lr == 0, np.nan, lr))))
    found = [lines("lr", "learning rate", curves)]
    metrics = dict.fromkeys([*left.source.metric_names, *right.source.metric_names])
    for place, metric in enumerate(list(metrics)[:12]):
        both = [
            (
                {"name": run.label, "colour": colour, "markers": metric.startswith("val_")},
                run.source.actual(METRICS, metric),
            )
            for colour, run in enumerate((left, right))
        ]
        found.append(lines(f"metric-{place}", metric, both, log=False))
    return [chart for chart in found if chart is not None]


def _trains(pair: Pair, left: Source, right: Source) -> bool:
    """Return whether the pair has a curve in one of the runs."""
    sides = ((left, pair.left), (right, pair.right))
    return any(group is not None and source.peaks.get(group) for source, group in sides)


def _table(caption: str, first: str, labels: tuple[str, str], rows: Sequence[Row]) -> str:
    cells = [[name(key), text(one), text(other)] for key, one, other in rows]
    return table(caption, [first, *labels], cells)


def _diff(found: Sequence[str]) -> str:
    if not found:
        return "<p>The plans are the same.</p>"
    kinds = {"+": "plus", "-": "minus", "@": "at"}
    rows = [f'<span class="{kinds.get(line[:1], "")}">{text(line)}</span>' for line in found]
    joined = "\n".join(rows)
    return f'<pre class="diff" tabindex="0">{joined}</pre>'
