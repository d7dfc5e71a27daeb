"""The lines of a table: one for each group, or one for several groups that are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .._util.folding import family, folded
from ..model.parameters import ParamInfo
from ..resolve.resolved import Cell
from .shown import Row, Shown

#: more lines than these are folded: with header and notes they fit a terminal of 40 rows
MOST = 24


@dataclass(frozen=True)
class Line:
    """One line of the table: a group, or several that are shown as one."""

    label: str
    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """How many numbers its groups hold."""
        return sum(row.parameters for row in self.rows)

    @property
    def trains(self) -> bool:
        """Whether any of its groups ever trains."""
        return any(row.first is not None for row in self.rows)


def shown_lines(preview: Shown, full: bool = False) -> list[Line]:
    """Return the lines of the table.

    What one rule freezes for the whole run is one line, whatever else is set for its parts: no
    value of it is used. If there are more than `MOST` lines then, groups whose names differ only
    in numbers become one; if there are still too many, those with the fewest parameters become the
    last line.

    Args:
        preview: what is shown.
        full: one line for each group, however many there are.
    """
    if full:
        return [Line(row.group, (row,)) for row in preview.rows]
    lines = _frozen_by_rule(preview)
    if len(lines) <= MOST:
        return lines
    lines = _layers_as_one(lines)
    return lines if len(lines) <= MOST else _rest_counted(lines)


def _frozen_by_rule(preview: Shown) -> list[Line]:
    """Return a line for each group, but for frozen ones a line for each rule that freezes."""
    frozen: dict[str, list[Row]] = {}
    cells = set()
    for cell, row in zip(preview.resolved.cells, preview.rows, strict=True):
        if not cell.windows:
            cells.add(row.group)
            for rule, infos in _by_freezing_rule(preview, cell).items():
                size = sum(info.numel for info in infos)
                part = replace(row, tensors=len(infos), parameters=size)
                frozen.setdefault(rule, []).append(part)
    if len(cells) <= len(frozen):  # a group may hold what several rules freeze
        return [Line(row.group, (row,)) for row in preview.rows]
    lines = {rule: Line(rule, tuple(rows)) for rule, rows in frozen.items()}
    first = next(place for place, row in enumerate(preview.rows) if row.group in cells)
    single = [Line(row.group, (row,)) for row in preview.rows if row.group not in cells]
    return [*single[:first], *lines.values(), *single[first:]]


def _by_freezing_rule(preview: Shown, cell: Cell) -> dict[str, list[ParamInfo]]:
    """Return the parameters of a frozen group by the rule that froze each."""
    found: dict[str, list[ParamInfo]] = {}
    for info in cell.parameters:
        chain = preview.resolved.chains[info.name].get("window", ())
        found.setdefault(chain[-1].rule if chain else cell.name, []).append(info)
    return found


def _layers_as_one(lines: Sequence[Line]) -> list[Line]:
    """Return the lines with those as one whose names differ only in numbers."""
    alike: dict[Any, list[Line]] = {}
    for line in lines:
        row = line.rows[0]
        always = row.thaw == "trains"
        kind = (family(line.label), row.optimizer, line.trains, always, family(row.gradients))
        alike.setdefault(kind, []).append(line)
    return [
        Line(
            folded([line.label for line in members]),
            tuple(row for line in members for row in line.rows),
        )
        for members in alike.values()
    ]


def _rest_counted(lines: list[Line]) -> list[Line]:
    """Return the largest lines in their order, and one last line for all others."""
    by_size = sorted(lines, key=lambda line: line.parameters, reverse=True)
    kept = {id(line) for line in by_size[: MOST - 1]}
    rows = tuple(row for line in lines if id(line) not in kept for row in line.rows)
    return [line for line in lines if id(line) in kept] + [Line(f"{len(rows):,} more groups", rows)]
