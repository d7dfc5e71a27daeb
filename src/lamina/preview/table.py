"""A preview as a table: plain text without extras, or with rich."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any

import numpy as np

from .._util.text import listed
from ..errors import require
from .header import PLAIN_NORM, facts, header
from .rows import number, span
from .shown import Row, Shown
from .sparkline import can_show, curve

#: without a terminal, as in a log file
_WIDTH = 110
_MIN_NAME = 20
_GAP = "  "
_ASCII = str.maketrans({"–": "-", "→": ">", "…": "~", "─": "-", "·": "|", "×": "x"})


@dataclass(frozen=True)
class Column:
    """Titles of one or two lines over cells; columns of the highest rank give way first."""

    title: tuple[str, ...]
    cells: tuple[str, ...]
    rank: int = 0
    left: bool = False

    @cached_property
    def width(self) -> int:
        """How wide it must be for its longest cell; every line of the table asks for it."""
        return max(len(cell) for cell in (*self.title, *self.cells))


def text(preview: Shown, width: int | None = None, *, unicode: bool | None = None) -> str:
    """Return a preview as plain text.

    Args:
        preview: what to show.
        width: in characters; the terminal's by default.
        unicode: whether to use characters beyond ASCII; by default, if standard output can.
    """
    width = width or shutil.get_terminal_size((_WIDTH, 24)).columns
    unicode = can_show() if unicode is None else unicode
    shown, dropped = fit(columns(preview, unicode), width)
    lines = [*_wrapped(header(preview), width), ""]
    for titles in zip_longest(*(column.title[::-1] for column in shown), fillvalue=""):
        lines.insert(len(lines) if not lines[-1] else -1, _line(shown, titles))
    lines.append(_GAP.join("─" * column.width for column in shown))
    lines += [
        _line(shown, cells) for cells in zip(*(column.cells for column in shown), strict=True)
    ]
    lines += _notes(preview, dropped, width)
    joined = "\n".join(line.rstrip() for line in lines)
    return joined if unicode else joined.translate(_ASCII).encode("ascii", "replace").decode()


def rich_parts(preview: Shown, width: int, *, unicode: bool = True) -> Iterator[Any]:
    """Return a preview as parts that rich prints: the header, the table, the notes."""
    table_module = require("rich.table", "cli", "a rich table")
    rich_text = require("rich.text", "cli", "a rich table")
    shown, dropped = fit(columns(preview, unicode), width)
    first, *others = header(preview)
    yield rich_text.Text(first, style="bold")
    for line in others:
        yield rich_text.Text(line, style="dim")
    yield rich_text.Text("")
    table = table_module.Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in shown:
        curve = column.title == _SPARK
        table.add_column(
            rich_text.Text("\n".join(("",) * (2 - len(column.title)) + column.title)),
            justify="left" if column.left else "right",
            style="cyan" if curve else "",
            no_wrap=True,
        )
    for row, cells in zip(preview.rows, zip(*(c.cells for c in shown), strict=True), strict=True):
        # Text, not str: rich would read brackets in a pattern as markup.
        table.add_row(*map(rich_text.Text, cells), style="dim" if row.first is None else "")
    yield table
    for line in _notes(preview, dropped, width):
        yield rich_text.Text(line, style="yellow" if line.startswith(_MARK) else "")


# --- columns ------------------------------------------------------------------------------------

_SPARK = ("lr over", "time")
_MARK = "! "


def columns(preview: Shown, unicode: bool = True) -> list[Column]:
    """Return all columns worth showing: those in which the groups differ, and the lr."""
    rows = preview.rows
    said = facts(preview)

    def column(*title: str, cells: Sequence[str], rank: int = 0, left: bool = False) -> Column:
        return Column(title, tuple(cells), rank, left)

    found = [
        column("group", cells=[row.group for row in rows], left=True),
        column(
            "params",
            "in tensors",
            cells=[f"{count(row.parameters)} in {row.tensors}" for row in rows],
            rank=4,
        ),
    ]
    if "optimizer" not in said:
        found.append(column("optimizer", cells=[row.optimizer for row in rows], rank=2, left=True))
    found += _lr_columns(preview)
    if "weight_decay" not in said:
        cells = [span(row.weight_decay, row.weight_decay_end) for row in rows]
        found.append(column("weight", "decay", cells=cells, rank=3))
    if "gradients" not in said:
        limits = _limits(rows)
        cells = [limits.get(row.scope or "", "–") for row in rows]
        title = ("clip", "norm") if _only_norms(rows) else ("gradients",)
        found.append(column(*title, cells=cells, rank=5))
    if any(row.thaw != "trains" for row in rows):
        found.append(column("thaw", cells=[row.thaw for row in rows], left=True))
    if preview.run.steps is not None and not _constant(rows):
        curves = [curve(np.where(r.active, r.lr, np.nan), unicode=unicode) for r in rows]
        found.append(column(*_SPARK, cells=curves, rank=6, left=True))
    return found


def _lr_columns(preview: Shown) -> list[Column]:
    rows = preview.rows
    start = tuple(number(row.lr_start) for row in rows)
    if preview.run.steps is None:
        return [Column(("first", "lr"), start)]
    if _constant(rows):
        return [Column(("lr",), start)]
    return [
        Column(("lr at", "start"), start, rank=1),
        Column(("lr at", "peak"), tuple(number(row.lr_peak) for row in rows)),
        Column(("lr at", "end"), tuple(number(row.lr_end) for row in rows), rank=1),
    ]


def _constant(rows: Sequence[Row]) -> bool:
    """Return whether no lr ever moves."""
    return all(np.ptp(row.lr[row.active]) == 0 for row in rows if row.active.any())


def _only_norms(rows: Sequence[Row]) -> bool:
    """Return whether gradients are clipped by norm and nothing else."""
    return all(re.fullmatch(PLAIN_NORM, row.gradients) for row in rows if row.scope)


def _limits(rows: Sequence[Row]) -> dict[str, str]:
    """Return what each scope does to gradients; letters tell apart scopes that do the same."""
    short = "clip_norm " if _only_norms(rows) else ""
    limits = {row.scope: row.gradients.removeprefix(short) for row in rows if row.scope}
    if "plan" in limits:  # what no rule took out of it; it is said last
        limits["plan"] = limits.pop("plan")
    uses = Counter(limits.values())
    alike = [scope for scope, limit in limits.items() if uses[limit] > 1]
    for place, scope in enumerate(alike):
        limits[scope] += f" ({chr(ord('a') + place % 26)})"
    return limits


def count(amount: int) -> str:
    """Return a number of parameters in about five characters."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if amount >= 10 * size or (unit != "k" and amount >= size):
            return f"{amount / size:.3g}{unit}"
    return f"{amount:,}"


# --- making it fit ------------------------------------------------------------------------------


def fit(given: list[Column], width: int) -> tuple[list[Column], list[str]]:
    """Fit columns to a width: shorten long names first, then drop the least needed ones."""
    shown, dropped = list(given), []
    while _rest(shown, width) < min(_MIN_NAME, shown[0].width) and any(c.rank for c in shown):
        least = max(shown, key=lambda column: column.rank)
        dropped.append(" ".join(least.title))
        shown = [column for column in shown if column is not least]
    names = shorten(shown[0].cells, max(_rest(shown, width), _MIN_NAME))
    return [replace(shown[0], cells=names), *shown[1:]], dropped


def _rest(shown: Sequence[Column], width: int) -> int:
    """Return what the other columns leave for the names."""
    return width - sum(column.width + len(_GAP) for column in shown[1:])


def shorten(names: Sequence[str], width: int) -> tuple[str, ...]:
    """Cut long names in the middle, where it leaves the most of them distinct."""
    while True:
        tries = [tuple(_cut(name, width, tail) for name in names) for tail in _tails(width)]
        best = max(tries, key=lambda cut: len(set(cut)))  # the first of equals
        if len(set(best)) == len(set(names)):
            return best
        width += 4  # two groups must never look the same


def _tails(width: int) -> list[int]:
    return sorted({width * 2 // 5, width // 4, width // 6, width // 2, width * 2 // 3})[::-1][1:]


def _cut(name: str, width: int, tail: int) -> str:
    return name if len(name) <= width else f"{name[: width - tail - 1]}…{name[len(name) - tail :]}"


def _line(shown: Sequence[Column], cells: Sequence[str]) -> str:
    return _GAP.join(
        cell.ljust(column.width) if column.left else cell.rjust(column.width)
        for column, cell in zip(shown, cells, strict=True)
    )


def _wrapped(lines: Sequence[str], width: int) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, max(width, 30)) or [""]]


def _ties(preview: Shown) -> str:
    """List the parameters with several names; of many the first few."""
    ties = [
        " = ".join(info.names)
        for cell in preview.resolved.cells
        for info in cell.parameters
        if len(info.names) > 1
    ]
    return listed(ties)


def _notes(preview: Shown, dropped: Sequence[str], width: int) -> list[str]:
    """Return what stands below the table: clip scopes, columns left out, findings."""
    lines = []
    if "gradients" not in facts(preview):
        norms = _only_norms(preview.rows)
        said = ", ".join(
            f"{limit} over {'everything else' if scope == 'plan' else scope}"
            + (" together" if norms else "")
            for scope, limit in _limits(preview.rows).items()
        )
        lines += _wrapped([f"{'clip norm' if norms else 'gradients'}: {said}"], width)
    if dropped:
        lines += _wrapped([f"left out at this width: {', '.join(dropped)}"], width)
    if tied := _ties(preview):
        lines += _wrapped([f"tied, each updated once: {tied}"], width)
    for finding in preview.findings:
        wrapped = textwrap.wrap(f"{_MARK}{finding}", max(width, 30), subsequent_indent=_GAP)
        lines += ["", *wrapped] if finding is preview.findings[0] else wrapped
    return ["", *lines] if lines and lines[0] else lines
