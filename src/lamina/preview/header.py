"""What is said once above a table: the run, and what all groups have in common."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .._util.text import listed
from ..runtime.flags import REDUCED
from .reactions import reaction_lines
from .rows import epochs, span
from .shown import Shown

if TYPE_CHECKING:
    from ..state.extend import Resumed

#: gradient operations that are nothing but the usual clipping
PLAIN_NORM = r"clip_norm [^,(]+"


def header(preview: Shown) -> list[str]:
    """Return the lines above the table."""
    said = facts(preview)
    lines = [" · ".join([_length(preview), *_groups(preview, said)])]
    common = [said[key] for key in ("weight_decay", "gradients") if said.get(key)]
    if common:
        lines.append(" · ".join(common))
    if preview.resumed is not None:
        lines.append(resumed_line(preview, preview.resumed))
    if preview.run.steps is None:
        lines.append("Pass steps=, or epochs= and steps_per_epoch=, to see the whole run.")
    frozen = _freezing(preview)
    if frozen:
        lines.append(frozen)
    return [*lines, *reaction_lines(preview)]


def facts(preview: Shown) -> dict[str, str]:
    """Return settings in which all groups that train agree, in words."""
    rows = [row for row in preview.rows if row.first is not None]
    said = {}
    optimizers = {row.optimizer for row in preview.rows}
    if len(optimizers) == 1:
        said["optimizer"] = optimizers.pop()
    decays = {span(row.weight_decay, row.weight_decay_end) for row in rows}
    if len(decays) <= 1:
        said["weight_decay"] = f"weight decay {decays.pop()}" if decays else ""
    scopes = {(row.scope, row.gradients) for row in rows}
    if len(scopes) <= 1:
        scope, operations = scopes.pop() if scopes else (None, "")
        if re.fullmatch(PLAIN_NORM, operations):
            limit = operations.removeprefix("clip_norm ")
            said["gradients"] = f"clip norm {limit} (one norm over all that trains)"
        elif scope is not None:
            said["gradients"] = f"gradients: {operations}"
        else:
            said["gradients"] = "no clipping" if rows else ""
    return said


def _length(preview: Shown) -> str:
    run = preview.run
    if run.steps is None:
        return "run length unknown"
    text = f"{run.steps:,} step{'s' if run.steps != 1 else ''}"
    if run.steps_per_epoch is None:
        return text
    amount = epochs(run.steps, run.steps_per_epoch)
    return f"{text} ({amount} epoch{'s' if amount != '1' else ''} of {run.steps_per_epoch:,})"


def resumed_line(preview: Shown, resumed: Resumed) -> str:
    """Return where a saved run goes on, and what became of its schedules."""
    text = f"resumes at step {resumed.clock:,} of a saved run"
    if resumed.saved_run is None or resumed.saved_run.steps is None:
        return f"{text} whose length is unknown"
    planned = preview.resolved.planned
    if resumed.settled_anew:
        return (
            f"{text} of {resumed.saved_run.steps:,} steps; schedules are fitted to the new length"
        )
    if planned is None or planned.steps is None:
        return text
    return f"{text}; schedules are those for {planned.steps:,} steps, then hold their last value"


def _groups(preview: Shown, said: dict[str, str]) -> list[str]:
    many = len(preview.rows)
    groups = [f"{many} group{'s' if many != 1 else ''}", training(preview)]
    return [said["optimizer"], *groups] if "optimizer" in said else groups


def training(preview: Shown) -> str:
    """Return how many of the parameters ever train, in words."""
    trained = sum(row.parameters for row in preview.rows if row.first is not None)
    return f"{trained:,} of {sum(row.parameters for row in preview.rows):,} parameters train"


def _freezing(preview: Shown) -> str:
    """Return how frozen parts are kept from training; empty if nothing is ever frozen."""
    rows = preview.rows
    if all(row.thaw == "trains" for row in rows):
        return ""
    kept = preview.flags.kept
    reduced = [name for name, reason in kept.items() if reason == REDUCED]
    if reduced:
        return (
            f"DistributedDataParallel reduces {listed(reduced)}: while frozen, requires_grad stays "
            "on and the gradient is zero, in every norm too."
        )
    if kept:
        return (
            f"DistributedDataParallel may wrap the model yet, so {listed(list(kept))} of what "
            "trains later keeps requires_grad on with zero gradients until the first step."
        )
    return "While a group is frozen, its requires_grad is off: no gradient, no optimizer state."
