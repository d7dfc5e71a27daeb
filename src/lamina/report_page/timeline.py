"""When each group trains, as bars: what was planned above what was recorded."""

from __future__ import annotations

import math

from .html import name, text
from .source import Source

#: rows; groups that train at the same steps share one
_ROWS = 80

Spans = tuple[tuple[int, int], ...]


def timeline(source: Source) -> str:
    """Return the bars of all groups as HTML."""
    merged: dict[tuple[Spans, Spans, bool], list[str]] = {}
    for group in source.groups:
        key = (tuple(source.planned_spans(group)), tuple(source.spans(group)))
        merged.setdefault((*key, source.peaks[group] is None), []).append(group)
    rows = list(merged.items())
    length = source.last_step + 1
    drawn = [_row(source, groups, key[0], key[1], length) for key, groups in rows[:_ROWS]]
    left_out = sum(len(groups) for _, groups in rows[_ROWS:])
    more = f"<p>{left_out:,} more groups are not drawn.</p>" if left_out else ""
    return f'<ul class="timeline">{"".join(drawn)}</ul>{_axis(length)}{more}'


def _row(source: Source, groups: list[str], planned: Spans, seen: Spans, length: int) -> str:
    label = name(groups[0], 44)
    if len(groups) > 1:
        label += f' <span class="more">and {len(groups) - 1} more</span>'
    colour = source.colours[groups[0]]
    bars = "".join(_bar(span, length, colour, "plan") for span in planned)
    bars += "".join(_bar(span, length, colour, "seen") for span in seen)
    said = _said(planned, "planned") + _said(seen, "trained")
    title = "\n".join(groups[:20])
    return (
        f'<li><span class="label" title="{text(title)}">{label}</span>'
        f'<span class="track" role="img" aria-label="{text(said or "never trains")}">{bars}</span>'
        "</li>"
    )


def _bar(span: tuple[int, int], length: int, colour: str, kind: str) -> str:
    begin, end = span
    left, width = 100 * begin / length, 100 * (end - begin) / length
    title = f"{'planned' if kind == 'plan' else 'trained'}: steps {begin} to {end - 1}"
    style = f"left:{left:.3f}%;width:{width:.3f}%;--c:{colour}"
    return f'<span class="bar {kind}" style="{style}" title="{title}"></span>'


def _said(spans: Spans, verb: str) -> str:
    texts = [f"steps {begin} to {end - 1}" for begin, end in spans[:6]]
    return f"{verb}: {', '.join(texts)}. " if texts else ""


def _axis(length: int) -> str:
    ticks = _ticks(length)
    marks = "".join(
        f'<span style="left:{100 * tick / length:.3f}%">{tick:,}</span>' for tick in ticks
    )
    return f'<div class="axis" aria-hidden="true"><span></span><span>{marks}</span></div>'


def _ticks(length: int) -> list[int]:
    """Return about five round numbers from 0 to the end of the run."""
    rough = max(1.0, length / 6)
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return list(range(0, length, step))
