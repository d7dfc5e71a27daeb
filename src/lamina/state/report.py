"""What a load came to, as data and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .._util.text import listed
from ..schedules.duration import Run


@dataclass(frozen=True)
class Changed:
    """A hyperparameter of a group, or a threshold of a rule, that is not what was saved.

    `moves`: it is given by a schedule, in the plan as it is now; `parameters` counts whose.
    """

    group: str
    key: str
    saved: Any
    now: Any
    parameters: int = 1
    moves: bool = False

    def __str__(self) -> str:
        return f"{self.key} of {self.group!r}: {_text(self.saved)} -> {_text(self.now)}"


@dataclass(frozen=True)
class LoadReport:
    """The difference between a saved state and the optimizer that loaded it; prints as text.

    Args:
        kept: parameters whose state was taken over (or that never had any, being frozen).
        new: parameters that train by now, of which the state knows nothing; they begin anew.
        restarted: parameters whose state was another optimizer's; it was dropped, and they begin
            anew, their `step` at 0.
        renamed: pairs of the saved and the present name.
        dropped: what is in the state and not in the model or the plan.
        hyperparameters: values at the clock that are not the saved ones; the plan's stay.
        clock: the steps taken.
        clock_from: `"clock"`, or for a state without a clock `"steps"` (the most updates that any
            parameter received) or `"nothing"` (then it is 0).
        saved_run: the length of the run that was saved; None if the state does not know it.
        run: the length of this run.
        saved_planned: the length that its schedules fitted: not `saved_run` if it was held.
        planned: the length that the schedules fit now.
        converted: parameters whose state has another dtype than it was saved in, as triples of the
            name, the saved dtype and the one it has now.
        rounding: parameters whose state had a `master` or `compensation` that they do not use now,
            or has one now that was not saved and begins with the weights: triples of the name, the
            saved entry ("" for none) and the present one.
        matched_by: `"names"`, or `"positions"` for a state without names.
    """

    kept: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    restarted: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = ()
    hyperparameters: tuple[Changed, ...] = ()
    clock: int = 0
    clock_from: str = "clock"
    saved_run: Run | None = None
    run: Run | None = None
    saved_planned: Run | None = None
    planned: Run | None = None
    matched_by: str = "names"
    converted: tuple[tuple[str, str, str], ...] = ()
    rounding: tuple[tuple[str, str, str], ...] = ()

    @property
    def jumps(self) -> tuple[str, ...]:
        """In words, each value that schedules of another length make jump at the clock."""
        return jumps(self.hyperparameters, self.clock, self.saved_planned, self.planned)

    def __str__(self) -> str:
        lines = [f"{_count(len(self.kept), 'parameter')} kept their state, at step {self.clock}"]
        if self.clock_from == "steps":
            lines.append(
                "no clock in the state: the step was taken from the update counts of the parameters"
            )
        elif self.clock_from == "nothing":
            lines.append("no clock and no update counts in the state: the step count starts at 0")
        if self.matched_by == "positions":
            lines.append("matched by position: the state has no names")
        if self.saved_run not in (None, self.run):
            lines.append(f"run: saved with {length_of(self.saved_run)}, now {length_of(self.run)}")
        if (self.saved_planned, self.planned) != (self.saved_run, self.run) and settled_anew(
            self.saved_planned, self.planned
        ):
            lines.append(
                f"schedules: of {length_of(self.saved_planned)}, now of {length_of(self.planned)}"
            )
        named = [f"{old} -> {new}" for old, new in self.renamed]
        rows: list[tuple[str, Sequence[str]]] = [
            ("new", self.new),
            ("restarted, since the state was another optimizer's", self.restarted),
            ("renamed", named),
            ("dropped", self.dropped),
            ("state in another dtype", _changes(self.converted)),
            ("state of another rounding", _changes(self.rounding)),
            ("changed by the new plan", [str(row) for row in self.hyperparameters]),
        ]
        lines += [f"{what}: {listed(texts)}" for what, texts in rows if texts]
        return "\n".join(lines)


def _changes(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Return what parameters had and have, with the number of those that changed alike."""
    pairs = Counter(f"{old or 'none'} -> {new or 'none'}" for _, old, new in rows)
    return [f"{pair} ({_count(number, 'parameter')})" for pair, number in pairs.items()]


def settled_anew(saved: Run | None, now: Run | None) -> bool:
    """Return whether the schedules fit another length of run than the saved ones.

    Args:
        saved: the run that the saved schedules fitted, which need not be the one that was saved.
        now: the run that they fit now.
    """
    return saved is not None and saved != now


def jumps(
    changed: Sequence[Changed], clock: int, saved: Run | None, now: Run | None
) -> tuple[str, ...]:
    """Describe each value that jumps because the schedules fit another length."""
    if not settled_anew(saved, now):
        return ()
    return tuple(_jump(row, clock) for row in changed if row.moves)


def _jump(row: Changed, clock: int) -> str:
    """Return a value that jumps, in words."""
    times = ""
    if isinstance(row.saved, (int, float)) and isinstance(row.now, (int, float)) and row.saved:
        ratio = f"{row.now / row.saved:.3g}"
        times = "" if ratio == "1" else f" (x{ratio})"
    values = f"from {_text(row.saved)} to {_text(row.now)}"
    return f"{row.key} of {row.group!r} jumps {values} at step {clock}{times}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def length_of(run: Run | None) -> str:
    """Return the length of a run in words."""
    if run is None or run.steps is None:
        return "an unknown length"
    epoch = f" (epochs of {run.steps_per_epoch:,})" if run.steps_per_epoch else ""
    return f"{run.steps:,} steps{epoch}"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    return f"{value:.6g}" if isinstance(value, float) else repr(value)
