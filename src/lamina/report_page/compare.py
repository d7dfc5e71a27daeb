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
    both = (left, right)
    keys = dict.fromkeys([*left.settings, *right.settings])
    settings = [(key, *(run.settings.get(key, _MISSING) for run in both)) for key in keys]
    plans = [run.plan.splitlines() for run in both]
    diff = difflib.unified_diff(*plans, left.label, right.label, lineterm="")
    groups = dict.fromkeys([*left.source.groups, *right.source.groups])
    lr = [(group, *(_lr_text(run.source, group) for run in both)) for group in groups]
    metrics = dict.fromkeys([*left.source.metric_names, *right.source.metric_names])
    return Comparison(
        (left.label, right.label),
        tuple(row for row in settings if row[1] != row[2]),
        tuple(diff),
        tuple(row for row in lr if row[1] != row[2]),
        tuple((metric, *(_metric_text(run.source, metric) for run in both)) for metric in metrics),
    )


def _lr_text(source: Source, group: str) -> str:
    if group not in source.groups:
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
    colours = dict(zip(_groups(left, right), _colours(left, right), strict=True))
    write_page(Path(path), title, "<p>Two runs side by side.</p>", body, charts, [], colours)


def _groups(left: Compared, right: Compared) -> list[str]:
    return list(dict.fromkeys([*left.source.groups, *right.source.groups]))


def _colours(left: Compared, right: Compared) -> list[str]:
    known = {**right.source.colours, **left.source.colours}
    return [known[group] for group in _groups(left, right)]


def _charts(left: Compared, right: Compared) -> list[dict[str, Any]]:
    places = {group: place for place, group in enumerate(_groups(left, right))}
    curves = []
    for run, dash in ((left, "solid"), (right, "dot")):
        for group in run.source.drawn[:DRAWN]:
            steps, lr = run.source.actual(group, "lr")
            look = {"group": places[group], "name": run.label, "dash": dash, "width": 2}
            curves.append((look, (steps, np.where(lr == 0, np.nan, lr))))
    found = [lines("lr", "learning rate", curves)]
    metrics = dict.fromkeys([*left.source.metric_names, *right.source.metric_names])
    for place, metric in enumerate(list(metrics)[:12]):
        pair = [
            (
                {"name": run.label, "colour": colour, "markers": metric.startswith("val_")},
                run.source.actual(METRICS, metric),
            )
            for colour, run in enumerate((left, right))
        ]
        found.append(lines(f"metric-{place}", metric, pair, log=False))
    return [chart for chart in found if chart is not None]


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
