"""The report as one HTML file: head, charts, tables, tree, and the script that draws."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import require
from ..files.atomic import atomic
from ..model.finding import Finding
from ..preview.rows import number
from ..record.planned import ParameterEntry, Planned
from ..record.record import METRICS, Record
from . import charts, tables
from .html import data, folded, name, script_hash, table, text
from .source import DRAWN, Source
from .timeline import timeline
from .tree import tree

Chart = dict[str, Any]

#: words in the code of a finding, and the part of the page that shows what it is about
_ABOUT = (
    (("clip", "norm", "gradient", "finite", "unscaled"), "gradients"),
    (("round", "ratio", "moved", "update"), "updates"),
    (("frozen", "freeze", "thaw", "train", "statistics"), "timeline"),
    (("tie", "optimizer", "group", "parameter", "requires"), "model"),
    (("lr", "schedule", "warm", "decay", "plateau", "steps", "length", "end", "floor"), "lr"),
)


def write_report(
    record: Record,
    path: str | os.PathLike[str],
    *,
    planned: Planned | None = None,
    parameters: Sequence[ParameterEntry] = (),
    title: str = "Training report",
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write the report of a run as one HTML file, which works without a network.

    Args:
        record: what happened; an empty one gives a report of the plan alone.
        path: the file, replaced if it exists; it appears whole or not at all.
        planned: what was meant, from `Preview.planned()`; its curves lie under those of the record.
        parameters: the parameters of the model, with the group of each; by default the plan's.
        title: what the report is about.
        facts: what else is known of the run, by name.

    Raises:
        MissingExtraError: if plotly is not installed.
        LaminaError: if the file cannot be written; what was there stays.

    Example:
        >>> import tempfile
        >>> record = Record()
        >>> record.add(0, "head", lr=1e-3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_report(record, f"{folder}/report.html")
    """
    source = Source(record, planned, parameters, title, dict(facts or {}))
    write_page(Path(path), title, _subtitle(source), *_sections(source), source.colours)


def write_page(
    path: Path,
    title: str,
    subtitle: str,
    body: str,
    drawn: Sequence[Chart],
    marks: Sequence[dict[str, Any]],
    colours: Mapping[str, str],
) -> None:
    """Write a page with charts.

    Args:
        path: the file.
        title: its heading.
        subtitle: HTML below it.
        body: the sections as HTML, with a place for each chart.
        drawn: the charts.
        marks: vertical lines in those over the steps.
        colours: the groups in the order in which charts number them, with their colours.
    """
    plotly: Any = require("plotly.offline", "report", "The report")
    library = plotly.get_plotlyjs()
    own = _file("page.js")
    groups = [{"name": group, "colour": colour} for group, colour in colours.items()]
    content = data({"charts": list(drawn), "marks": list(marks), "groups": groups})
    # Nothing is fetched, and no script runs but these two, whatever a name may hold.
    policy = (
        "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src {script_hash(library)} {script_hash(own)}"
    )
    parts = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{text(title)}</title><style>{_file('page.css')}</style></head><body>",
        f'<header class="top"><h1>{text(title)}</h1>{subtitle}</header>',
        f"<main>{body}</main>",
        '<footer>Written by lamina. One file, no network.</footer><div id="said" role="status"',
        ' aria-live="polite"></div>',
        f'<script type="application/json" id="data">{content}</script>',
        f"<script>{library}</script><script>{own}</script></body></html>\n",
    )
    with atomic(path) as file:
        for part in parts:
            file.write(part.encode("utf-8", "backslashreplace"))


def _file(called: str) -> str:
    return resources.files(__package__).joinpath(called).read_text(encoding="utf-8")


# --- the sections --------------------------------------------------------------------------------


def _sections(source: Source) -> tuple[str, list[Chart], list[dict[str, Any]]]:
    """Return the body of the page, its charts and the lines in them."""
    found: list[Chart] = []

    def place(chart: Chart | None, label: str) -> str:
        if chart is None:
            return ""
        found.append(chart)
        return chart_place(chart, label)

    parts = {
        "lr": ("Learning rate", _lr(source, place)),
        "timeline": ("When each part trains", _timeline(source)),
        "metrics": ("Loss and metrics", _metrics(source, place)),
        "gradients": ("Gradients and clipping", _gradients(source, place)),
        "updates": ("Updates", _updates(source, place)),
        "model": ("Model", tree(source)),
        "events": ("Events", tables.event_table(source) if source.record.events else ""),
        "facts": ("Settings", _facts(source)),
    }
    present = {key: title for key, (title, content) in parts.items() if content}
    findings = _findings(source, present)
    body = [_navigation(source, present), findings, _chips(source)]
    body += [card(key, title, content) for key, (title, content) in parts.items() if content]
    return "".join(body), found, charts.marks(source)


def card(key: str, title: str, content: str) -> str:
    """Return a section of the page."""
    return (
        f'<section id="{key}" class="card" aria-labelledby="{key}-h"><h2 id="{key}-h">'
        f"{text(title)}</h2>{content}</section>"
    )


def chart_place(chart: Chart, label: str) -> str:
    """Return where the script draws a chart, with its buttons.

    Args:
        chart: the chart.
        label: what it shows, for screen readers.
    """
    key = chart["id"]
    buttons = ""
    if chart["kind"] == "lines":
        buttons = (
            f'<span class="choice" role="group" aria-label="Axis of {text(label)}">'
            f'<button type="button" data-axis="{key}" data-type="log">log</button>'
            f'<button type="button" data-axis="{key}" data-type="linear">linear</button></span>'
        )
        if any(trace.get("name") == "planned" and trace.get("dash") for trace in chart["traces"]):
            buttons += (
                f'<button type="button" class="single" data-planned="{key}" aria-pressed="true">'
                "planned</button>"
            )
    title = chart.get("yTitle") or "update / weight"
    return (
        f'<figure><figcaption><span class="unit">{text(title)}</span>'
        f'<span class="tools">{buttons}</span></figcaption>'
        f'<div class="chart" id="chart-{key}" tabindex="0" role="img" aria-label="{text(label)}. '
        'Arrow keys read it step by step; the table below has its numbers."></div></figure>'
    )


def _lr(source: Source, place: Any) -> str:
    chart = place(charts.lr_chart(source), "Learning rate by group over the steps")
    if not chart:
        return ""
    planned = source.planned is not None
    if planned and source.record.last_step is not None:
        hint = "Solid: applied. Dotted: planned. Gaps: the group is frozen."
    else:
        hint = "As planned." if planned else "As applied."
    return f'<p class="hint">{hint}</p>{chart}{folded("Table", tables.lr_table(source))}'


def _timeline(source: Source) -> str:
    if not source.groups:
        return ""
    both = source.planned is not None and source.record.last_step is not None
    hint = "Pale: planned. Solid: lr above 0." if both else "Where the lr is above 0."
    return f'<p class="hint">{hint}</p>{timeline(source)}'


def _metrics(source: Source, place: Any) -> str:
    found = charts.metric_charts(source)
    if not found:
        return ""
    figures = "".join(place(chart, f"{chart['yTitle']} over the steps") for chart in found)
    held_out = any(name.startswith("val_") for name in source.metric_names)
    hint = '<p class="hint">Dots: held-out data.</p>' if held_out else ""
    rows = folded("Table", tables.metric_table(source))
    return f'{hint}<div class="grid">{figures}</div>{rows}'


def _gradients(source: Source, place: Any) -> str:
    norms = charts.group_chart(source, "gradients", "gradient norm", "grad_norm")
    figures = place(norms, "Gradient norm by group, before clipping")
    scopes = place(charts.norm_chart(source), "Norm of each clip scope before clipping")
    factor = place(charts.scope_chart(source), "Clip factor by group")
    if not figures + scopes + factor:
        return ""
    rows = tables.measured_table(source, "grad_norm", "Gradient norm by group")
    if scopes:
        rows += tables.scope_table(source)
    if factor:
        rows += tables.measured_table(source, "clip", "Clip factor by group")
    hint = "Before clipping. A clip factor below 1 is a step that was clipped."
    return (
        f'<p class="hint">{hint}</p>{figures}<div class="grid">{scopes}{factor}</div>'
        f"{folded('Table', rows)}"
    )


def _updates(source: Source, place: Any) -> str:
    chart = place(charts.heat_map(source), "Ratio of update to weight over the steps")
    if not chart:
        return ""
    hint = (
        "Norm of the update over norm of the weights, the largest of each span of steps. About "
        "1e-3 is common; far below it a group hardly moves, far above it may be unstable."
    )
    weights = charts.group_chart(source, "weights", "weight norm", "weight_norm")
    more = place(weights, "Weight norm by group over the steps")
    rows = tables.measured_table(source, "ratio", "Update over weight by group")
    rows += tables.layer_table(source)
    rows += tables.measured_table(source, "weight_norm", "Weight norm by group")
    return f'<p class="hint">{hint}</p>{chart}{more}{folded("Table", rows)}'


def _facts(source: Source) -> str:
    if not source.facts:
        return ""
    rows = [[text(key), text(value)] for key, value in source.facts.items()]
    return table("Settings of the run", ["setting", "value"], rows)


# --- head, findings, groups ----------------------------------------------------------------------


def _subtitle(source: Source) -> str:
    lines = () if source.planned is None else source.planned.header
    return "".join(f"<p>{text(line)}</p>" for line in lines[:3]) + _tiles(source)


def _tiles(source: Source) -> str:
    """Return the few numbers that most readers look for."""
    total = None if source.planned is None else source.planned.total
    taken = source.steps_taken
    tiles = []
    if taken:
        tiles.append(("steps", f"{taken:,}" + (f" of {total:,}" if total else "")))
    training = sum(peak is not None for peak in source.peaks.values())
    tiles.append(
        ("groups", f"{len(source.groups):,}" + (f", {training:,} train" if training else ""))
    )
    for metric in [n for n in source.metric_names if n.startswith("val_")][:3]:
        values = source.actual(METRICS, metric)[1]
        tiles.append((metric, number(float(values[-1]))))
    tiles.append(("findings", str(len(source.findings))))
    cells = "".join(
        f"<div><dt>{text(key)}</dt><dd>{text(value)}</dd></div>" for key, value in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _navigation(source: Source, present: Mapping[str, str]) -> str:
    links = {"findings": "Findings"} if source.findings else {}
    links |= present
    entries = "".join(f'<a href="#{key}">{text(title)}</a>' for key, title in links.items())
    return f'<nav aria-label="Parts of the report">{entries}</nav>'


def _findings(source: Source, present: Mapping[str, str]) -> str:
    if not source.findings:
        return ""
    cards = "".join(_finding(source, finding, present) for finding in source.findings[:200])
    left_out = len(source.findings) - 200
    more = f"<p>{left_out:,} more findings are not listed.</p>" if left_out > 0 else ""
    return card("findings", "Findings", f'<ul class="findings">{cards}</ul>{more}')


def _finding(source: Source, finding: Finding, present: Mapping[str, str]) -> str:
    links = "".join(
        f'<a href="#{key}">{text(present[key])}</a>' for key in _parts_about(finding, present)
    )
    at = [event.step for event in source.record.events if event.kind == finding.code]
    when = f'<span class="when">from step {min(at):,}</span>' if at else ""
    named = [
        place
        for place, group in enumerate(source.groups[: DRAWN * 4])
        if group and group in finding.message
    ]
    button = ""
    if named and len(named) < len(source.groups):
        chosen = " ".join(map(str, named))
        button = f'<button type="button" data-only="{chosen}">show its groups</button>'
    return (
        f'<li class="{finding.severity}"><h3>{finding.severity}: <code>{text(finding.code)}</code>'
        f"{when}</h3><p>{text(finding.message)}</p>"
        f'<p class="fix">{text(finding.fix)}</p><p class="links">{links}{button}</p></li>'
    )


def _parts_about(finding: Finding, present: Mapping[str, str]) -> list[str]:
    """Return the parts of the page that show what a finding is about, the closest first."""
    words = finding.code.split("-")
    found = [
        part
        for known, part in _ABOUT
        if part in present and any(word.startswith(known) for word in words)
    ]
    return found[:2] or [part for part in ("lr", "model") if part in present][:1]


def _chips(source: Source) -> str:
    """Return the buttons that show and hide groups in all charts."""
    if len(source.drawn) < 2:
        return ""
    places = {group: place for place, group in enumerate(source.groups)}
    buttons = "".join(
        f'<button type="button" data-group="{places[group]}" aria-pressed="true" '
        f'style="--c:{source.colours[group]}">{name(group, 40)}</button>'
        for group in source.drawn
    )
    training = sum(peak is not None for peak in source.peaks.values())
    said = f'<span class="more">{len(source.drawn)} of {training:,} groups are drawn</span>'
    more = said if training > len(source.drawn) else ""
    return (
        '<div class="chips" role="group" aria-label="Groups shown in the charts">'
        '<button type="button" class="all" data-all="1">all</button>'
        f'<button type="button" class="all" data-all="0">none</button>{buttons}{more}</div>'
    )
