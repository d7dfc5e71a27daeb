"""What a report of metrics means for a plan: which reactions see it, and what they have seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .._util.sharding import is_distributed
from ..errors import PlanError, did_you_mean
from ..plan.reactions import EarlyStop, OnPlateau, Plateau
from ..resolve.resolved import Resolved
from ..resolve.timeline import Feedback

#: what all reactions of a plan have seen, by their key; plain numbers, saved with the state
AllSeen = Mapping[str, Mapping[str, Any]]


def begin_all(resolved: Resolved) -> dict[str, dict[str, Any]]:
    """Return what the reactions of a plan have seen before any report."""
    return {key: reaction.begin() for key, reaction in resolved.reactions}


def check_report(resolved: Resolved, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the reported numbers; raise `PlanError` for a NaN or if none is watched."""
    watched = {reaction.metric: reaction for _, reaction in resolved.reactions}
    if not metrics:
        raise PlanError("report was given no metric; expected such as report(val_loss=0.31).")
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            raise PlanError(f"report({name}={value!r}): expected a number.") from None
        if math.isnan(numbers[name]) and name in watched:
            raise PlanError(
                f"report({name}=nan): {watched[name]!r} cannot compare NaN with the best so far. "
                "Look for the first bad loss; nothing was changed."
            )
    if watched and not watched.keys() & numbers.keys():
        raise PlanError(
            f"report was given {', '.join(numbers)}, but the plan watches {', '.join(watched)}."
            f"{did_you_mean(next(iter(numbers)), watched)}"
        )
    return numbers


def observe_all(
    resolved: Resolved, seen: AllSeen, numbers: Mapping[str, float], step: int
) -> dict[str, dict[str, Any]]:
    """Return what the reactions have seen after a report at a step; pure."""
    run = resolved.settled_for  # whose patience, as all times
    end = math.inf if resolved.run.steps is None else resolved.run.steps
    new = {key: dict(value) for key, value in seen.items()}
    for key, reaction in resolved.reactions:
        if isinstance(reaction, (Plateau, OnPlateau)) and reaction.metric in numbers:
            value = numbers[reaction.metric]
            new[key] = reaction.observe(seen[key], value, step, run)
    for key, reaction in resolved.reactions:  # after the others, whose changes give hope
        if isinstance(reaction, EarlyStop) and reaction.metric in numbers:
            begins = _begins(resolved, new)
            opened = sum(0 < begin <= step for begin in begins)
            pending = any(begin == math.inf or step < begin < end for begin in begins)
            lowered = any(new[other].get("changes") != seen[other].get("changes") for other in seen)
            thaw = opened > seen[key]["opened"] or pending
            value = numbers[reaction.metric]
            new[key] = reaction.observe(seen[key], value, step, run, thaw, lowered)
            new[key]["opened"] = opened
    return new


def changes(old: AllSeen, new: AllSeen) -> list[str]:
    """Return what a report changed, in words, for the log."""
    lines = []
    for key, now in new.items():
        before = old.get(key, {})
        if now.get("changes") != before.get("changes"):
            lines.append(f"{key}: lr is multiplied by {now['changes'][-1][1]:g} from now on")
        if now.get("opened") != before.get("opened") and "stop" not in now:
            lines.append(f"{key}: trains from step {now['opened']}")
        if now.get("stop") and not before.get("stop"):
            lines.append(f"{key}: should stop, best was {now['best']}")
    return lines


def from_rank_zero(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the metrics of rank 0, on every process; they decide alike, whatever each measured."""
    if not is_distributed():
        return metrics
    box = [{name: float(value) for name, value in metrics.items()}]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _begins(resolved: Resolved, seen: AllSeen) -> list[float]:
    """Return the steps of all thaws, infinite for those that wait for a metric."""
    feedback = Feedback(seen=seen)
    return [begin for cell in resolved.cells for begin, _ in feedback.windows(cell)]
