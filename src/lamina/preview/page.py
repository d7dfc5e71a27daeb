"""A preview in a notebook: HTML that fits light and dark pages; every name is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..errors import printable
from .fold import Line, shown_lines
from .header import header
from .shown import Shown
from .table import MARK, Column, columns, notes

_PRE = "white-space:pre-wrap;font-family:monospace;line-height:1.3;margin:0"
_CELL = "padding:1px 12px 1px 0;white-space:pre;border:0;vertical-align:bottom"


def html(preview: Shown) -> str:
    """Return a preview as a fragment of HTML: header, table, notes and findings."""
    lines = shown_lines(preview)
    first, *others = header(preview)
    parts = [f"<div><b>{_text(first)}</b></div>"]
    parts += [f'<div style="opacity:.75">{_text(line)}</div>' for line in others]
    parts.append(_table(columns(preview, lines), lines))
    for line in notes(preview, lines, [], None):
        weight = "font-weight:600;" if line.startswith(MARK) else ""
        parts.append(f'<div style="{weight}margin-top:2px">{_text(line)}</div>')
    return f'<div style="overflow-x:auto">{"".join(parts)}</div>'


def preformatted(text: str) -> str:
    """Return text as HTML that keeps its lines."""
    return f'<pre style="{_PRE}">{_text(text)}</pre>'


def _table(found: Sequence[Column], lines: Sequence[Line]) -> str:
    """Return the columns as a table; what never trains is faint."""
    head = [_cell("th", "<br>".join(map(_text, each.title)), left=each.left) for each in found]
    rows = [f"<tr>{''.join(head)}</tr>"]
    for line, cells in zip(lines, zip(*(each.cells for each in found), strict=True), strict=True):
        faint = "" if line.trains else ' style="opacity:.6"'
        body = [
            _cell("td", _text(cell), left=each.left)
            for each, cell in zip(found, cells, strict=True)
        ]
        rows.append(f"<tr{faint}>{''.join(body)}</tr>")
    style = "border-collapse:collapse;margin:6px 0;font-family:monospace"
    return f'<table style="{style}">{"".join(rows)}</table>'


def _cell(tag: str, content: str, *, left: bool) -> str:
    side = "left" if left else "right"
    return f'<{tag} style="{_CELL};text-align:{side}">{content}</{tag}>'


def _text(text: str) -> str:
    """Return text for HTML; names may hold markup and control characters."""
    return escape(printable(text))
