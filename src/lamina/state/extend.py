"""A run that goes on from a saved state, longer or shorter than it was: hold or stretch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import PlanError, StateError, TimeUnitError, did_you_mean
from ..resolve.resolved import Resolved
from ..resolve.timeline import Feedback, Values, values_at
from ..schedules.duration import Run, parse
from .compare import TOLERANCE, differences
from .history import restore_history
from .load import clock_of, in_order
from .match import match
from .report import Changed, jumps, length_of, settled_anew
from .schema import Saved, read

#: what may become of a plan when the length of its run changes
WAYS = ("hold", "stretch")
_SAMPLES = 2000


@dataclass(frozen=True)
class Resumed:
    """A plan settled for the rest of a run.

    `before` is the plan as it was settled for the saved run (None if its length is unknown) and
    `resolved` as it goes on from `clock`; `changed` are the values that differ there. `past` and
    `feedback` are what happened so far, by the groups of `before` and of `resolved`. The saved
    schedules fitted `saved_planned`, which is not `saved_run` where that was held.
    """

    resolved: Resolved
    before: Resolved | None
    clock: int
    feedback: Feedback
    past: Feedback
    saved_run: Run | None
    saved_planned: Run | None
    changed: tuple[Changed, ...]

    @property
    def settled_anew(self) -> bool:
        """Whether its schedules fit another length from the clock on."""
        return settled_anew(self.saved_planned, self.resolved.settled_for)

    @property
    def jumps(self) -> tuple[str, ...]:
        """In words, each value that jumps at the clock because of that."""
        return jumps(self.changed, self.clock, self.saved_planned, self.resolved.settled_for)


def resume_from(
    settle: Callable[..., Resolved],
    run: Run,
    state_dict: Any,
    extend: str | None,
    renamed: Mapping[str, str | None] | None = None,
) -> Resumed | None:
    """Settle a plan for a run that goes on from a saved state; None without a state.

    Args:
        settle: settles the plan for a run of a given length; `planned=`, with the schedules of
            another one.
        run: the length of the run from now on, its first part included.
        state_dict: the saved state.
        extend: "hold" keeps the schedules of the saved length, and their last values after it;
            "stretch" fits the same shapes to the new length; None if nothing depends on it.
        renamed: from saved names to those of now.

    Raises:
        PlanError: for an unknown word, or a word without a state.
        StateError: if the run is further than its new length, or if that differs, values depend on
            it, and extend is None.
    """
    check_extend(extend)
    _check_resumed(extend, renamed, state_dict is not None)
    if state_dict is None:
        return None
    saved = read(state_dict)
    known = saved.run is not None and saved.run.steps is not None
    if extend is not None and not known:
        raise StateError(
            f"extend={extend!r}, but the saved state does not know the length of its run; leave "
            "extend out: the plan's values for the new length are used."
        )
    clock = clock_of(saved)[0]
    if run.steps is not None and clock > run.steps:
        raise StateError(
            f"the saved run is at step {clock:,}, and this one is to end after {run.steps:,} "
            "steps; give it more steps or epochs than that."
        )
    resolved, before = settled(settle, run, saved, extend, renamed)
    matched = match(saved, in_order(resolved), renamed)
    feedback = restore_history(saved, matched, resolved)[0]
    past = feedback if before is None else restore_history(saved, matched, before)[0]
    changed = differences(saved, matched, resolved, clock, values_at(resolved, clock, feedback))
    return Resumed(resolved, before, clock, feedback, past, saved.run, saved.settled_for, changed)


def settled(
    settle: Callable[..., Resolved],
    run: Run,
    saved: Saved,
    extend: str | None,
    renamed: Mapping[str, str | None] | None,
) -> tuple[Resolved, Resolved | None]:
    """Return the plan for the rest of the run, and as it was for the saved one."""
    if saved.run is None or saved.run.steps is None:
        return settle(run), None
    planned = saved.planned or saved.run
    before = settle(planned)
    if extend == "hold" or (extend is None and saved.run == run):
        return before if planned == run else settle(run, planned=planned), before
    stretched = settle(run)
    if extend is None:
        matched = match(saved, in_order(before), renamed)
        feedback = [restore_history(saved, matched, each)[0] for each in (before, stretched)]
        difference = first_difference(before, stretched, clock_of(saved)[0], *feedback)
        if difference:
            raise StateError(
                f"the saved run was planned for {length_of(planned)}, this one has "
                f"{length_of(run)}, and the plan depends on that: {difference}. Pass extend='hold' "
                "(the saved schedules, then their last values) or extend='stretch' (the same "
                "shapes over the new length); for lamina run, --extend."
            )
    return stretched, before


def check_extend(extend: Any) -> None:
    """Raise `PlanError` unless `extend` is None or one of the words for a run of another length."""
    if extend is not None and extend not in WAYS:
        near = did_you_mean(extend, WAYS) if isinstance(extend, str) else ""
        raise PlanError(f"extend={extend!r}: expected None, 'hold' or 'stretch'.{near}")


def _check_resumed(extend: str | None, renamed: Any, resumed: bool) -> None:
    """Raise `PlanError` for what says how a saved run goes on, where none does."""
    if renamed is not None and not resumed:
        raise PlanError(
            f"renamed={dict(renamed)!r} says what the names in a saved state are now; give the "
            "state, resume=state."
        )
    if extend is not None and not resumed:
        raise PlanError(
            f"extend={extend!r} says how a saved run goes on; give its state, resume=state."
        )


def first_difference(
    one: Resolved, other: Resolved, clock: int, feedback: Feedback, feedback_other: Feedback
) -> str:
    """Describe a value that differs between two settlements from the clock on; "" if none."""
    impatient = _patience(one, other)
    if impatient or (one.cells, one.scopes) == (other.cells, other.scopes):
        return impatient
    last = max(2 * clock + 2, one.run.steps or 0, other.run.steps or 0)
    edges = {
        step + shift
        for resolved in (one, other)
        for cell in resolved.cells
        for span in cell.windows
        for step in span
        if isinstance(step, int)
        for shift in (-1, 0)
    }
    steps = np.linspace(clock, last, min(_SAMPLES, last - clock + 1)).astype(np.int64)
    inside = [step for step in edges if clock <= step <= last]
    steps = np.union1d(steps, np.array(inside, dtype=np.int64))
    pair = values_at(one, steps, feedback), values_at(other, steps, feedback_other)
    compared = _compared(one, other, pair, steps)
    return next((f"{what} {told}" for what, told in compared if told), "")


def _compared(
    one: Resolved, other: Resolved, pair: tuple[Values, Values], steps: Any
) -> Iterator[tuple[str, str]]:
    """Return what has a value over the steps, and in words how that differs ("" if it does not)."""
    first, second = pair
    names: dict[tuple[int, int], str] = {}
    for name, index in one.cell_of.items():
        names.setdefault((index, other.cell_of[name]), name)
    for (mine, its), name in names.items():
        hyper, hyper_other = first.hyper(mine), second.hyper(its)
        for key in hyper:
            yield f"{key} of {name!r}", _apart(hyper[key], hyper_other[key], steps)
        alike = np.array_equal(first.active(mine), second.active(its))
        yield f"the window of {name!r}", "" if alike else "is another one"
    for index, scope in enumerate(one.scopes):
        rows = zip(first.operations(index), second.operations(index), strict=True)
        for (operation, amount), (_, amount_other) in rows:
            told = _apart(amount, amount_other, steps)
            yield f"{operation.source_name} of {scope.name!r}", told


def _patience(one: Resolved, other: Resolved) -> str:
    """Describe a reaction whose patience is another number of steps; "" if there is none."""
    for key, reaction in one.reactions:
        try:
            first, second = (
                parse(reaction.patience).in_steps(each.settled_for) for each in (one, other)
            )
        except TimeUnitError:
            continue  # the length of an epoch is unknown: no report can be made
        if first != second:
            return f"the patience of {key} would be {float(second):g} steps, not {float(first):g}"
    return ""


def _apart(one: Any, other: Any, steps: Any) -> str:
    """Return where two values over the steps differ by more than rounding, in words."""
    if isinstance(one, tuple):
        parts = (_apart(a, b, steps) for a, b in zip(one, other, strict=True))
        return next((part for part in parts if part), "")
    if not isinstance(one, (int, float, np.ndarray)):
        return "" if one == other else f"would be {other!r} instead of {one!r}"
    first, second = (np.broadcast_to(np.asarray(v, dtype=float), steps.shape) for v in (one, other))
    apart = ~np.isclose(first, second, rtol=TOLERANCE, atol=0.0)
    if not apart.any():
        return ""
    place = int(np.argmax(apart))
    return f"at step {steps[place]} would be {second[place]:.6g} instead of {first[place]:.6g}"
