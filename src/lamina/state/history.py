"""The history of a saved run beside its tensors: overrides, and what reactions have seen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import PlanError, StateError
from ..plan.reactions import REACTIONS
from ..resolve.resolved import Cell, Resolved
from ..resolve.timeline import Feedback
from ..runtime.overrides import check_override
from ..runtime.reports import begin_all
from ..schedules.duration import LONGEST
from .match import Matched
from .schema import Entry, Group, Saved, is_count, reading, short

#: the keys of a group under which this is saved, each as one text of JSON
KEYS = ("overrides", "feedback")
#: what each kind of reaction keeps
_KEPT = [set(kind("metric").begin()) for kind in REACTIONS.values()]


def _unwritten(group: Group, key: str, absent: Any) -> Any:
    value = group.get(key, absent)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise StateError(f"the saved {key} are not readable ({error}): {short(value)}.") from None


@reading("the overrides and the feedback of the saved run")
def restore_history(
    saved: Saved, matched: Matched, resolved: Resolved
) -> tuple[Feedback, tuple[str, ...]]:
    """Restore overrides and feedback for the present groups; also describe what is lost.

    Args:
        saved: the state.
        matched: whose entries are under the names of the present parameters.
        resolved: the plan as it is now.
    """
    overrides, lost_overrides = _overrides_of(saved, matched, resolved)
    seen, lost_seen = _feedback_of(saved.groups, resolved)
    return Feedback(overrides, seen), (*lost_overrides, *lost_seen)


def _overrides_of(
    saved: Saved, matched: Matched, resolved: Resolved
) -> tuple[dict[str, list[Any]], list[str]]:
    """Return the overrides of each group: those that all its parameters were saved with."""
    histories = {id(g): _history(_unwritten(g, "overrides", [])) for g in saved.groups}
    lost = {id(entry.group) for entry in _not_asked(saved, matched)}
    taken: set[int] = set()
    left: set[int] = set()
    kept: dict[str, list[Any]] = {}
    for cell in resolved.cells:
        entries = [matched.entries.get(info.name) for info in cell.parameters]
        sources = list(dict.fromkeys(id(entry.group) for entry in entries if entry is not None))
        found = [histories[source] for source in sources]
        if any(found) and found.count(found[0]) == len(found) and _applies(cell, found[0]):
            kept[cell.name] = found[0]
            taken.update(sources)
        else:
            left.update(sources)
    lost = (lost - taken) | left
    return kept, [
        f"override of {group.get('name')!r}"
        for group in saved.groups
        if histories[id(group)] and id(group) in lost
    ]


def _not_asked(saved: Saved, matched: Matched) -> list[Entry]:
    """Return the saved entries that the user did not ask to leave out."""
    asked = set(matched.asked)
    names = saved.names or [""] * len(saved.entries)
    return [entry for name, entry in zip(names, saved.entries, strict=True) if name not in asked]


def _history(saved: Any) -> list[Any]:
    """Return a list of `[step, {hyperparameter: number}]`, as new lists."""
    history: list[Any] = []
    for item in saved if isinstance(saved, (list, tuple)) else [saved]:
        pair: Any = item if isinstance(item, (list, tuple)) and len(item) == 2 else (None, None)
        begin, changed = pair
        fits = is_count(begin) and isinstance(changed, Mapping)
        if not fits or not all(isinstance(k, str) and _number(v) for k, v in changed.items()):
            raise StateError(
                f"a saved override is {short(item)}; expected [step, {{hyperparameter: number}}]."
            )
        if history and begin < history[-1][0]:
            raise StateError(
                f"a saved override begins at step {begin}, and the one before it at "
                f"{history[-1][0]}; expected them in the order of their steps."
            )
        history.append([begin, dict(changed)])
    return history


def _applies(cell: Cell, history: Sequence[Any]) -> bool:
    """Return whether the overrides of a saved group still fit what the plan makes of it."""
    try:
        for _, changed in history:
            if changed:
                check_override(cell, changed)
    except PlanError:
        return False
    return True


def _feedback_of(
    groups: Sequence[Group], resolved: Resolved
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return what the plan's reactions have seen, and in words what was seen for others."""
    telling = next((group for group in groups if "feedback" in group), {})
    saved = _unwritten(telling, "feedback", {})
    if not isinstance(saved, Mapping):
        raise StateError(f"the saved feedback is {short(saved)}; expected a dict by reaction.")
    found = begin_all(resolved)
    left = []
    for key, seen in saved.items():
        _check_seen(key, seen)
        if key in found and found[key].keys() == seen.keys():
            found[key] = {k: _copied(v) for k, v in seen.items()}
        else:
            left.append(f"what {key!r} has seen")
    return found, left


def _check_seen(key: Any, seen: Any) -> None:
    """Raise `StateError` for feedback state that no reaction can produce."""
    if not isinstance(seen, Mapping) or set(seen) not in _KEPT:
        raise StateError(
            f"the saved feedback of {key!r} is {short(seen)}, which no reaction keeps."
        )
    for name, value in seen.items():
        if name == "changes":
            fits = _are_changes(value)
        elif name == "best":
            fits = value is None or _number(value)
        elif name in ("stop", "waited"):
            fits = isinstance(value, bool)
        else:  # an early stop counts what has opened, a thaw has its step or none yet
            fits = is_count(value) or (name == "opened" and value is None and "stop" not in seen)
        if not fits:
            raise StateError(f"the saved feedback of {key!r} has {name}={short(value)}.")


def _are_changes(value: Any) -> bool:
    """Return whether a plateau can have made these changes: each lower than the last."""
    step, multiplier = 0, 1.0
    for item in value if isinstance(value, (list, tuple)) else [None]:
        if not isinstance(item, (list, tuple)) or len(item) != 2:
            return False
        if not (is_count(item[0]) and _number(item[1])):
            return False
        if item[0] < step or not 0 <= item[1] < multiplier:
            return False
        step, multiplier = item
    return True


def _number(value: Any) -> bool:
    """Return whether a value is a number that is no NaN, nor an int beyond all floats."""
    if isinstance(value, float):
        return not math.isnan(value)
    return type(value) is int and abs(value) <= LONGEST


def _copied(value: Any) -> Any:
    return [list(item) for item in value] if isinstance(value, (list, tuple)) else value
