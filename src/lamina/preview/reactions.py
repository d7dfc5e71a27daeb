"""What reactions to metrics may do to a run, in words: nothing of it is known beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..errors import TimeUnitError
from ..plan.reactions import EarlyStop, Plateau
from ..runtime.reports import begin_all, observe_all
from ..schedules.duration import parse
from .rows import epochs
from .shown import Shown

#: reports times groups that are tried; a run of more is not worked out
_MOST = 200_000


def reaction_lines(preview: Shown) -> Iterator[str]:
    """Yield a line for each reaction of the plan."""
    for key, reaction in preview.resolved.reactions:
        if isinstance(reaction, EarlyStop):
            yield f"{reaction!r}: {_stop_text(preview, key, reaction)}."
        elif isinstance(reaction, Plateau):
            whose = key.removeprefix("plateau of ").removesuffix(
                f" ({reaction.metric}, {reaction.mode})"
            )
            of = "" if whose == "plan" else f" of {whose}"
            yield (
                f"{reaction!r}: multiplies lr{of} by {reaction.factor:g} each time "
                f"{reaction.metric} stalls; reductions to come are not in the table."
            )


def _stop_text(preview: Shown, key: str, stop: EarlyStop) -> str:
    run = preview.run
    if preview.feedback.seen.get(key, {}).get("stop"):
        return "the saved run was to stop"
    if run.steps is None or run.steps_per_epoch is None:
        return _without_epochs(preview, stop)
    reports = run.steps // run.steps_per_epoch
    if reports * len(preview.resolved.cells) > _MOST:
        return f"stops the run when {stop.metric} stalls"
    step = earliest_stop(preview, key, stop)
    given = f"with one report of {stop.metric} after each epoch"
    if step is None:
        return f"cannot stop this run before its end, {given}"
    epoch = epochs(step, run.steps_per_epoch)
    return f"may stop the run after step {step:,} (epoch {epoch}) at the earliest, {given}"


def _without_epochs(preview: Shown, stop: EarlyStop) -> str:
    """Return the least that can be said where nobody knows when reports come."""
    if isinstance(stop.patience, int):
        reports = stop.patience + 1
        return f"may stop the run at report {reports} of {stop.metric} at the earliest"
    try:
        steps = float(parse(stop.patience).in_steps(preview.resolved.settled_for))
    except TimeUnitError:
        return f"stops the run when {stop.metric} stalls"
    return f"may stop the run {steps:g} steps after the first report of {stop.metric}, not earlier"


def earliest_stop(preview: Shown, key: str, stop: EarlyStop) -> int | None:
    """Return the earliest step after which early stopping may end the run; None for never.

    The metric is reported after each epoch, and never improves on its best, or on its first value.
    Plateaus are left out: each reduction of lr gives the run another chance.

    Args:
        preview: a preview of a run whose epochs are known.
        key: of what the reaction has seen.
        stop: the reaction.
    """
    run, clock = preview.run, 0 if preview.resumed is None else preview.resumed.clock
    assert run.steps is not None
    assert run.steps_per_epoch is not None
    resolved = preview.resolved
    others = tuple(pair for pair in resolved.reactions if not isinstance(pair[1], Plateau))
    resolved = replace(resolved, reactions=others)
    seen: dict[str, Any] = {**begin_all(resolved), **preview.feedback.seen}
    numbers = {}
    for name, reaction in others:
        best = seen[name]["best"]
        if reaction.metric == stop.metric or reaction.metric not in numbers:
            numbers[reaction.metric] = 0.0 if best is None else float(best)
    every = run.steps_per_epoch
    for step in range((clock // every + 1) * every, run.steps, every):
        seen = observe_all(resolved, seen, numbers, step)
        if seen[key]["stop"]:
            return step
    return None
