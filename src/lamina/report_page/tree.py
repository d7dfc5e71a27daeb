"""The model as a tree of its modules, coloured by lr or by state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..preview.rows import number
from ..record.planned import ParameterEntry
from .colours import lr_colour, scale_css
from .html import text
from .source import Source

#: rows of the tree; of larger models the parameters, then the deepest modules are left out
_ROWS = 1500
#: levels that are open at first
_OPEN = 1


@dataclass(eq=False)
class Node:
    """A module: its parts by name, and its own parameters."""

    parts: dict[str, Node] = field(default_factory=dict)
    own: list[ParameterEntry] = field(default_factory=list)

    def all(self) -> list[ParameterEntry]:
        """Return the parameters in it and below it."""
        found = list(self.own)
        for part in self.parts.values():
            found += part.all()
        return found


def tree(source: Source) -> str:
    """Return the tree as nested lists that open and close; empty without a model."""
    entries = source.entries
    if not entries:
        return ""
    root = Node()
    for entry in entries:
        *modules, _ = entry.name.split(".")[:40]
        node = root
        for module in modules:
            node = node.parts.setdefault(module, Node())
        node.own.append(entry)
    known = [lr for lr in source.peaks.values() if lr]
    view = _View(source, min(known, default=1.0), max(known, default=1.0), *_depth(root))
    return f'{_legend(view)}<ul class="tree">{view.parts(root, "", 0)}</ul>'


def _depth(root: Node) -> tuple[int, bool]:
    """Return how many levels of modules are shown, and whether parameters are."""
    level, rows, depth = [root], 0, 0
    parameters = 0
    while level:
        parameters += sum(len(node.own) for node in level)
        level = [part for node in level for part in node.parts.values()]
        if rows + len(level) > _ROWS:
            return depth, False
        rows += len(level)
        depth += 1
    return depth, rows + parameters <= 2 * _ROWS


@dataclass(frozen=True)
class _View:
    """What the rows of a tree need to know."""

    source: Source
    low: float
    high: float
    depth: int
    leaves: bool

    def parts(self, node: Node, path: str, level: int) -> str:
        """Return the list entries of the modules and parameters in a module."""
        rows = []
        for part, below in node.parts.items():
            rows.append(self._module(part, below, f"{path}{part}.", level))
        if self.leaves or level == 0:
            rows += [self._parameter(entry, path) for entry in node.own[:_ROWS]]
        return "".join(rows)

    def _module(self, part: str, node: Node, path: str, level: int) -> str:
        entries = node.all()
        inside = self.parts(node, path, level + 1) if level + 1 < self.depth or self.leaves else ""
        line = self._line(part, entries, f"{sum(e.numel for e in entries):,} in {len(entries)}")
        if not inside:
            return f"<li>{line}</li>"
        opened = " open" if level < _OPEN and len(node.parts) <= 40 else ""
        return f"<li><details{opened}><summary>{line}</summary><ul>{inside}</ul></details></li>"

    def _parameter(self, entry: ParameterEntry, path: str) -> str:
        shape = " × ".join(map(str, entry.shape)) or "scalar"
        return f"<li>{self._line(entry.name.removeprefix(path), [entry], shape)}</li>"

    def _line(self, label: str, entries: Sequence[ParameterEntry], size: str) -> str:
        """Return one row: name, size, the bar of its parameters, and what they have in words."""
        words = self._words(entries)
        return (
            f'<span class="node"><code>{text(label[:200])}</code><span class="size">{size}</span>'
            f'<span class="share" aria-hidden="true">{self._segments(entries)}</span>'
            f'<span class="value">{text(words)}</span></span>'
        )

    def _segments(self, entries: Sequence[ParameterEntry]) -> str:
        """Return the shares of the parameters by lr and state."""
        total = sum(entry.numel for entry in entries) or 1
        shares: dict[tuple[str, str], int] = {}
        for entry in entries:
            key = (lr_colour(self._lr(entry), self.low, self.high), self._state(entry))
            shares[key] = shares.get(key, 0) + entry.numel
        largest = sorted(shares.items(), key=lambda item: item[1], reverse=True)[:12]
        return "".join(
            f'<i class="{state}" style="--lr:{colour};flex:{max(count / total, 0.01):.3f}"></i>'
            for (colour, state), count in largest
        )

    def _lr(self, entry: ParameterEntry) -> float | None:
        known = entry.trains and entry.group is not None
        return self.source.peaks.get(str(entry.group)) if known else None

    def _state(self, entry: ParameterEntry) -> str:
        if not entry.trains:
            return "frozen"
        if entry.group is None:
            return "none"
        return self.source.states.get(entry.group, "none")

    def _words(self, entries: Sequence[ParameterEntry]) -> str:
        rates = sorted({lr for lr in map(self._lr, entries) if lr})
        states = {self._state(entry) for entry in entries}
        parts = []
        if rates:
            same = len(rates) == 1
            parts.append(f"lr {number(rates[0])}" if same else _between(rates))
        if "frozen" in states:
            parts.append("frozen" if states == {"frozen"} else "part frozen")
        if "none" in states:
            parts.append("in no optimizer")
        if "later" in states:
            parts.append("later" if states == {"later"} else "part later")
        return " · ".join(parts)


def _between(rates: Sequence[float]) -> str:
    return f"lr {number(rates[0])} to {number(rates[-1])}"


def _legend(view: _View) -> str:
    states = (("trains", "trains"), ("later", "trains later"), ("frozen", "frozen"))
    boxes = "".join(f'<span><i class="{key}"></i>{words}</span>' for key, words in states)
    if any(entry.group is None and entry.trains for entry in view.source.entries):
        boxes += '<span><i class="none"></i>in no optimizer</span>'
    ramp = (
        f'<span class="ramp">lr {number(view.low)}<b style="background:linear-gradient(90deg,'
        f'{scale_css()})"></b>{number(view.high)}</span>'
    )
    return (
        '<div class="tree-head"><span class="choice" role="group" aria-label="Colour of the tree">'
        '<button type="button" data-tree="lr" aria-pressed="true">peak lr</button>'
        '<button type="button" data-tree="state" aria-pressed="false">state</button></span>'
        f'<span class="legend of-lr">{ramp}</span>'
        f'<span class="legend of-state">{boxes}</span></div>'
    )
