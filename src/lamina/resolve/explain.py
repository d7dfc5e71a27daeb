"""Why a number is what it is: the chain of rules behind every setting of a parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .._util.grammar import to_source
from ..algorithms.registry import optimizer_name
from ..errors import PatternError
from ..model.suggestions import missing_name
from ..plan.history import LONGEST_HISTORY
from ..schedules import Schedule
from .resolved import Cell, Origin, Resolved, Setting, WindowOrigin
from .timeline import Feedback, Values, values_at
from .windows import window_text


@dataclass(frozen=True)
class Link:
    """What one rule said of a setting, in words."""

    rule: str
    operation: str
    result: str


@dataclass(frozen=True)
class Line:
    """One setting: its value at the step, and what the rules said of it, in order."""

    key: str
    value: str
    chain: tuple[Link, ...]


@dataclass(frozen=True)
class Explanation:
    """What a parameter does at a step and why; prints as text.

    `names` are all names of a tied parameter; `end` is how many steps the run has, if that is known
    and the step is beyond them.
    """

    name: str
    step: int
    group: str
    active: bool
    lines: tuple[Line, ...]
    names: tuple[str, ...] = ()
    end: int | None = None

    def __str__(self) -> str:
        state = "trains" if self.active else "is frozen"
        text = [f"{self.name} at step {self.step}: {state}, in group {self.group!r}"]
        others = [name for name in self.names if name != self.name]
        if others:
            text.append(f"  tied: one parameter with {', '.join(others)}, updated once")
        if self.end is not None:
            text.append(
                f"  beyond the end: the run has {self.end} steps, the last is {self.end - 1}; "
                "schedules hold their last values"
            )
        for line in self.lines:
            text.append(f"  {line.key} = {line.value}")
            width = max((len(link.rule) for link in line.chain), default=0)
            for link in line.chain:
                text.append(f"      {link.rule:<{width}}  {link.operation}  ->  {link.result}")
        return "\n".join(text)

    __repr__ = __str__

    def data(self) -> dict[str, Any]:
        """Return it as plain data, such as JSON can hold."""
        return {
            "name": self.name,
            "names": list(self.names),
            "step": self.step,
            "group": self.group,
            "trains": self.active,
            "beyond_the_end": self.end is not None,
            "settings": [
                {"key": line.key, "value": line.value, "chain": [vars(link) for link in line.chain]}
                for line in self.lines
            ],
        }


def shown_value(value: object) -> str:
    """Return a value as an explanation shows it."""
    if isinstance(value, Setting):
        parts = [shown_value(value.scale)] if value.scale != 1 or not value.curves else []
        return " * ".join(parts + [f"({to_source(curve)})" for curve in value.curves])
    if isinstance(value, tuple):
        return "(" + ", ".join(shown_value(item) for item in value) + ")"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, type):
        return optimizer_name(value)
    if callable(value) and not isinstance(value, Schedule):
        return str(getattr(value, "__qualname__", type(value).__name__))
    return to_source(value)


def _link(origin: Origin | WindowOrigin) -> Link:
    if isinstance(origin, Origin):
        return Link(origin.rule, shown_value(origin.value), shown_value(origin.result))
    given = ", ".join(f"{key}={shown_value(value)}" for key, value in origin.given)
    reason = f" ({origin.dtype} has no gradients)" if origin.dtype else ""
    return Link(origin.rule, given, window_text(origin.windows) + reason)


def explain(resolved: Resolved, name: str, step: int, feedback: Feedback) -> Explanation:
    """Explain one parameter; raises `PatternError` with the closest names."""
    if name not in resolved.cell_of:
        near = missing_name(name, list(resolved.cell_of))
        raise PatternError(f"there is no parameter {name!r}; the closest are: {near}.")
    index = resolved.cell_of[name]
    cell = resolved.cells[index]
    values = values_at(resolved, step, feedback)
    origins = resolved.chains[name]
    chains = {key: tuple(map(_link, its)) for key, its in origins.items()}
    lines = [
        Line("optimizer", optimizer_name(cell.optimizer), chains.get("optimizer", ())),
        Line("window", window_text(cell.windows), chains.get("window", ())),
    ]
    if "frozen_state" in chains:
        lines.append(Line("frozen_state", cell.frozen_state, chains["frozen_state"]))
    hyper = values.hyper(index)
    for key, value in hyper.items():
        default = Link("default", optimizer_name(cell.optimizer), shown_value(value))
        chain = list(chains.get(key, (default,)))
        if key == "lr":
            chain += _lr_factors(values, cell, step, chains)
        history = feedback.overrides.get(cell.name, ())
        if len(history) == LONGEST_HISTORY and step < history[0][0]:
            chain.append(Link("overrides", f"those before step {history[0][0]} are not kept", ""))
        for begin, changed in history:
            if key in changed and begin <= step:
                chain.append(Link(f"override at {begin}", shown_value(changed[key]), ""))
        lines.append(Line(key, shown_value(value), tuple(chain)))
    if cell.scope is not None:
        shown = ", ".join(
            f"{operation.source_name} {shown_value(amount)}"
            if operation.amount != 1.0
            else repr(operation)
            for operation, amount in values.operations(cell.scope)
        )
        together = f"{shown} (all of rule {resolved.scopes[cell.scope].name!r} together)"
        lines.append(Line("gradients", together, chains.get("gradients", ())))
    names = resolved.info_of[name].names
    steps = resolved.run.steps
    end = steps if steps is not None and step >= steps else None
    active = bool(values.active(index))
    return Explanation(name, step, cell.name, active, tuple(lines), names, end)


def _lr_factors(values: Values, cell: Cell, step: int, chains: Any) -> Iterator[Link]:
    """Yield what the lr that the rules gave is multiplied with."""
    if cell.schedule is not None:
        factor = shown_value(float(cell.schedule(step)))
        rule = chains["schedule"][-1].rule
        yield Link(rule, f"schedule {to_source(cell.schedule)}", f"x {factor}")
    if cell.feedback is not None:
        link, factor = chains["feedback"][-1], shown_value(values.reaction(cell.feedback))
        yield Link(link.rule, link.operation, f"x {factor}")
    if cell.rewarm is not None:
        rule = chains["rewarm"][-1].rule
        yield Link(rule, f"rewarm {to_source(cell.rewarm)}", "after thaw")
    if not values.inside(cell):
        yield Link("window", window_text(cell.windows), "0 while frozen")
