"""A preview as a table: plain text without extras, or with rich."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any

import numpy as np

from .._util.text import listed
from ..errors import require
from .fold import Line, shown_lines
from .header import PLAIN_NORM, facts, header
from .rows import number, span
from .shown import Row, Shown
from .sparkline import can_show, curve

#: without a terminal, as in a log file
_WIDTH = 110
_MIN_NAME = 20
#: of more ties, or rules that operate on gradients, the rest is counted
_TIES, _SCOPES = 12, 40
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


def text(
    preview: Shown,
    width: int | None = None,
    *,
    unicode: bool | None = None,
    full: bool = False,
) -> str:
    """Return a preview as plain text.

    Args:
        preview: what to show.
        width: in characters; the terminal's by default.
        unicode: whether to use characters beyond ASCII; by default, if standard output can.
        full: one line for each group; by default, groups that are alike are folded.
    """
    width = width or shutil.get_terminal_size((_WIDTH, 24)).columns
    unicode = can_show() if unicode is None else unicode
    lines_shown = shown_lines(preview, full)
    shown, dropped = fit(columns(preview, lines_shown, unicode), width)
    lines = [*_wrapped(header(preview), width), ""]
    for titles in zip_longest(*(column.title[::-1] for column in shown), fillvalue=""):
        lines.insert(len(lines) if not lines[-1] else -1, _line(shown, titles))
    lines.append(_GAP.join("─" * column.width for column in shown))
    lines += [
        _line(shown, cells) for cells in zip(*(column.cells for column in shown), strict=True)
    ]
    lines += notes(preview, lines_shown, dropped, width)
    joined = "\n".join(line.rstrip() for line in lines)
    return joined if unicode else in_ascii(joined)


def in_ascii(joined: str) -> str:
    """Return a text for terminals that show nothing else."""
    return joined.translate(_ASCII).encode("ascii", "replace").decode()


def rich_parts(preview: Shown, width: int, *, unicode: bool = True) -> Iterator[Any]:
    """Return a preview as parts that rich prints: the header, the table, the notes."""
    table_module = require("rich.table", "cli", "a rich table")
    rich_text = require("rich.text", "cli", "a rich table")
    lines = shown_lines(preview)
    shown, dropped = fit(columns(preview, lines, unicode), width)
    first, *others = header(preview)
    yield rich_text.Text(first, style="bold")
    for other in others:
        yield rich_text.Text(other, style="dim")
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
    for line, cells in zip(lines, zip(*(c.cells for c in shown), strict=True), strict=True):
        # Text, not str: rich would read brackets in a pattern as markup.
        table.add_row(*map(rich_text.Text, cells), style="" if line.trains else "dim")
    yield table
    for note in notes(preview, lines, dropped, width):
        yield rich_text.Text(note, style="yellow" if note.startswith(MARK) else "")


# --- columns ------------------------------------------------------------------------------------

_SPARK = ("lr over", "time")
MARK = "! "


def columns(preview: Shown, lines: Sequence[Line], unicode: bool = True) -> list[Column]:
    """Return all columns worth showing: those in which the groups differ, and the lr."""
    rows = preview.rows
    said = facts(preview)

    def column(
        *title: str, cell: Callable[[Line], str], rank: int = 0, left: bool = False
    ) -> Column:
        return Column(title, tuple(map(cell, lines)), rank, left)

    def tensors(line: Line) -> str:
        return f"{count(line.parameters)} in {sum(row.tensors for row in line.rows)}"

    found = [
        column("group", cell=lambda line: line.label, left=True),
        column("params", "in tensors", cell=tensors, rank=4),
    ]
    if "optimizer" not in said:
        cell = partial(_each, lambda row: row.optimizer)
        found.append(column("optimizer", cell=cell, rank=2, left=True))
    found += _lr_columns(preview, lines)
    if "weight_decay" not in said:
        cell = partial(_each, lambda row: span(row.weight_decay, row.weight_decay_end))
        found.append(column("weight", "decay", cell=cell, rank=3))
    if "gradients" not in said:
        limits = _limits(rows)
        cell = partial(_each, lambda row: limits.get(row.scope or "", "–"))
        title = ("clip", "norm") if _only_norms(rows) else ("gradients",)
        found.append(column(*title, cell=cell, rank=5))
    if any(row.thaw != "trains" for row in rows):
        found.append(column("thaw", cell=partial(_each, lambda row: row.thaw), left=True))
    if preview.run.steps is not None and not _constant(rows):
        cell = partial(_curve, unicode=unicode)
        found.append(column(*_SPARK, cell=cell, rank=6, left=True))
    return found


def _each(text_of: Callable[[Row], str], line: Line) -> str:
    """Return what is said of each group of a line: the same, or that of the first to the last."""
    texts = list(dict.fromkeys(map(text_of, line.rows)))
    return texts[0] if len(texts) == 1 else f"{texts[0]} … {texts[-1]}"


def _numbers(value_of: Callable[[Row], float | None], line: Line) -> str:
    """Return a number of each group of a line: the same, or the smallest to the largest."""
    values = [value for row in line.rows if (value := value_of(row)) is not None]
    if not values:
        return number(None)
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low}…{high}"


def _curve(line: Line, unicode: bool) -> str:
    """Draw the lr over time; of several groups that of the one with the largest."""
    row = max(line.rows, key=lambda row: row.lr_peak or 0.0)
    return curve(np.where(row.active, row.lr, np.nan), unicode=unicode)


def _lr_columns(preview: Shown, lines: Sequence[Line]) -> list[Column]:
    def column(value_of: Callable[[Row], float | None], *title: str, rank: int = 0) -> Column:
        return Column(title, tuple(_numbers(value_of, line) for line in lines), rank)

    if preview.run.steps is None:
        return [column(lambda row: row.lr_start, "first", "lr")]
    if _constant(preview.rows):
        return [column(lambda row: row.lr_start, "lr")]
    return [
        column(lambda row: row.lr_start, "lr at", "start", rank=1),
        column(lambda row: row.lr_peak, "lr at", "peak"),
        column(lambda row: row.lr_end, "lr at", "end", rank=1),
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


def ties(preview: Shown) -> list[str]:
    """List the parameters with several names."""
    return [" = ".join(tie) for row in preview.rows for tie in row.ties]


def notes(
    preview: Shown, shown: Sequence[Line], dropped: Sequence[str], width: int | None
) -> list[str]:
    """Return what stands below the table: folded groups, clip scopes, ties, findings.

    Args:
        preview: what is shown.
        shown: the lines of the table.
        dropped: the columns that were left out.
        width: at which lines are wrapped; None for no wrapping.
    """
    lines = []
    folded = len({row.group for line in shown if len(line.rows) > 1 for row in line.rows})
    if folded:
        lines.append(
            f"{folded:,} groups are folded: a…b is the range over the groups of a line. To see "
            "each: preview.text(full=True), or --full on the command line."
        )
    if "gradients" not in facts(preview):
        norms = _only_norms(preview.rows)
        limits = list(_limits(preview.rows).items())
        said = [
            f"{limit} over {'everything else' if scope == 'plan' else scope}"
            + (" together" if norms else "")
            for scope, limit in limits
        ]
        lines.append(f"{'clip norm' if norms else 'gradients'}: {listed(said, _SCOPES)}")
    if dropped:
        lines.append(f"left out at this width: {', '.join(dropped)}")
    if tied := ties(preview):
        lines.append(f"tied, each updated once: {listed(tied, _TIES)}")
    lines = lines if width is None else _wrapped(lines, width)
    for finding in preview.findings:
        told = [f"{MARK}{finding}"]
        if width is not None:
            told = textwrap.wrap(told[0], max(width, 30), subsequent_indent=_GAP)
        lines += ["", *told] if finding is preview.findings[0] else told
    return ["", *lines] if lines and lines[0] else lines
