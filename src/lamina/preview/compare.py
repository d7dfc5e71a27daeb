"""Two plans on one model: what changes, for which parameters, at which steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .._util.folding import KnownNames, families
from .._util.text import listed
from ..plan.plan import Plan
from ..plan.toml import policy
from .behaviour import BITS, UNSAID, Behaviour, Behaviours, Floats, steps_of
from .rows import number
from .shown import Shown

#: parts that a printed comparison lists; the rest is counted
_LISTED = 40


@dataclass(frozen=True)
class Change:
    """One setting that differs: the first and the last step where it does, and its values there.

    Args:
        setting: `lr`, `betas[0]`, `optimizer`, `trains`, `clip_norm (1)`, ...; the number counts
            the gradient operations of a rule.
        steps: at how many steps it differs; of a very long run, of those that were looked at.
        first: the first step at which it differs.
        last: the last one.
        before: its value in the earlier plan at the first of these steps, then at the last.
        after: the same in the later plan.
    """

    setting: str
    steps: int
    first: int
    last: int
    before: tuple[Any, Any]
    after: tuple[Any, Any]

    def data(self) -> dict[str, Any]:
        """Return it as plain data, such as JSON can hold."""
        return {
            "setting": self.setting,
            "steps": self.steps,
            "first": self.first,
            "last": self.last,
            "before": list(self.before),
            "after": list(self.after),
        }


@dataclass(frozen=True)
class ChangedPart:
    """Parameters for which the same changes.

    Args:
        parameters: their names.
        numbers: how many numbers they hold.
        changes: what changes.
    """

    parameters: tuple[str, ...]
    numbers: int
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class PlanDiff:
    """What a later plan does otherwise than an earlier one; false if nothing. Prints as text.

    Args:
        parts: the parameters that change, in the order of the model.
        unchanged: how many parameters do not.
        only_before: parameters of the earlier model alone.
        only_after: parameters of the later model alone.
        run: the lengths of the two runs in steps.
        plan: settings of the plan as a whole that differ, such as `nonfinite`: both values.
        known: the names of all parameters of the earlier model, for short texts.
        since: the first step that counts.
        compared: at how many steps values were compared; 0 where a run ends before the first one.
    """

    parts: tuple[ChangedPart, ...]
    unchanged: int
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    run: tuple[int | None, int | None]
    plan: tuple[tuple[str, Any, Any], ...]
    known: tuple[str, ...] = field(repr=False, default=())
    since: int = 0
    compared: int = 1

    def __bool__(self) -> bool:
        beside = (self.only_before, self.only_after, self.plan)
        return bool(self.parts or any(beside) or self.run[0] != self.run[1])

    def __str__(self) -> str:
        return "\n".join(lines_of(self))

    def _repr_html_(self) -> str:
        from .page import preformatted

        return preformatted(str(self))

    def data(self) -> dict[str, Any]:
        """Return it as plain data, such as JSON can hold."""
        return {
            "same": not self,
            "steps": list(self.run),
            "plan": [list(each) for each in self.plan],
            "unchanged": self.unchanged,
            "only_before": list(self.only_before),
            "only_after": list(self.only_after),
            "parts": [
                {
                    "parameters": list(part.parameters),
                    "numbers": part.numbers,
                    "changes": [change.data() for change in part.changes],
                }
                for part in self.parts
            ],
        }


def compare(before: Shown, after: Shown, since: int = 0) -> PlanDiff:
    """Return what a later preview does otherwise; see `Preview.diff`.

    Args:
        before: the earlier preview.
        after: the later one.
        since: the first step that counts.
    """
    lengths = before.run.steps, after.run.steps
    known = [length for length in lengths if length is not None]
    steps = steps_of(min(known, default=None))
    steps = steps[steps >= since]
    places = [
        {info.name: (index, info) for index, cell in enumerate(each.resolved.cells)
         for info in cell.parameters}
        for each in (before, after)
    ]  # fmt: skip
    earlier, later = places
    pairs: dict[tuple[int, int], list[str]] = {}
    for name, (index, _) in earlier.items():
        if name in later:
            pairs.setdefault((index, later[name][0]), []).append(name)
    same: dict[tuple[Change, ...], list[str]] = {}
    one, other = Behaviours(before, steps), Behaviours(after, steps)
    for (left, right), names in pairs.items():
        same.setdefault(changes(one.of(left), other.of(right), steps), []).extend(names)
    order = {name: place for place, name in enumerate(earlier)}
    parts = [
        ChangedPart(
            tuple(sorted(names, key=order.__getitem__)),
            sum(earlier[name][1].numel for name in names),
            found,
        )
        for found, names in same.items()
        if found
    ]
    return PlanDiff(
        tuple(sorted(parts, key=lambda part: order[part.parameters[0]])),
        len(same.get((), ())),
        tuple(name for name in earlier if name not in later),
        tuple(name for name in later if name not in earlier),
        lengths,
        tuple(_policies(before.resolved.plan, after.resolved.plan)),
        tuple(earlier),
        since,
        len(steps),
    )


def _policies(before: Plan, after: Plan) -> Iterator[tuple[str, Any, Any]]:
    """Yield what the plans as a whole say otherwise, in words."""
    one, other = policy(before), policy(after)
    for key in dict.fromkeys((*one, *other)):
        left, right = (repr(each[key]) if key in each else "the default" for each in (one, other))
        if left != right:
            yield key, left, right


def changes(
    before: Behaviour, after: Behaviour, steps: npt.NDArray[np.int64]
) -> tuple[Change, ...]:
    """Return what differs between two behaviours at some steps."""
    found = []
    apart = before.active != after.active
    if apart.any():
        found.append(_change("trains", apart, steps, before.active, after.active))
    both = before.active & after.active
    waits = "thaw" in before.words and "thaw" in after.words
    everywhere = np.ones_like(both) if waits else both
    for key in ("optimizer", *sorted({*before.words, *after.words} - {"optimizer"})):
        one, other = (said.words.get(key, UNSAID.get(key)) for said in (before, after))
        # One of them may never train, and then it has nothing to say of most settings.
        silent = None in (one, other) and key not in ("gradients", "feedback", "thaw")
        if one != other and not silent and (both.any() or key in ("hold", "thaw") or waits):
            found.append(_change(key, np.ones_like(both), steps, one, other))
    if before.words.get("gradients") != after.words.get("gradients"):
        keys = [key for key in before.numbers if " (" not in key]
    else:
        keys = list(before.numbers)
    for key in keys:
        if key in after.numbers:
            left, right = before.numbers[key], after.numbers[key]
            if isinstance(left, float) and isinstance(right, float) and left == right:
                continue
            apart = _apart(left, right, everywhere)
            if apart.any():
                found.append(_change(key, apart, steps, left, right))
    return tuple(found)


def _apart(
    one: Floats | float, other: Floats | float, where: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Return where two numbers differ by more than the grid of the larger of their peaks."""
    left, right = np.broadcast_to(one, where.shape), np.broadcast_to(other, where.shape)
    if not where.any():
        return where
    peaks = [float(np.abs(each[where]).max()) for each in (left, right)]
    if not np.isfinite(peaks).all():
        return np.asarray((left != right) & where)
    return np.asarray((np.abs(left - right) > max(peaks) * 2.0 ** -(BITS + 1)) & where)


def _change(
    setting: str, apart: npt.NDArray[np.bool_], steps: npt.NDArray[np.int64], one: Any, other: Any
) -> Change:
    places = np.flatnonzero(apart)
    ends = (int(places[0]), int(places[-1]))

    def at(value: Any) -> tuple[Any, Any]:
        if isinstance(value, np.ndarray):
            return value[ends[0]].item(), value[ends[1]].item()
        return value, value

    first, last = (int(steps[place]) for place in ends)
    return Change(setting, len(places), first, last, at(one), at(other))


# --- as text ------------------------------------------------------------------------------------


def lines_of(found: PlanDiff) -> list[str]:
    """Return a comparison as lines of text."""
    changed = sum(len(part.parameters) for part in found.parts)
    total = changed + found.unchanged
    lengths = [f"{each:,} steps" if each is not None else "unknown length" for each in found.run]
    run = lengths[0] if lengths[0] == lengths[1] else f"{lengths[0]} → {lengths[1]}"
    if not found:
        return [f"{run}: the plans do the same with all {total:,} parameters"]
    lines = [f"{run}: {changed:,} of {total:,} parameters change"]
    if not found.compared:
        lines = [f"{run}: no step from {found.since:,} on is in both, so no values are compared"]
    lines += [f"{key}: {before} → {after}" for key, before, after in found.plan]
    for what, names in (("before", found.only_before), ("after", found.only_after)):
        if names:
            both = KnownNames([*found.known, *found.only_after])
            lines.append(f"only {what}: {listed(both.folded(names))}")
    blocks = _blocks(found)
    for part in blocks[:_LISTED]:
        lines += part
    if len(blocks) > _LISTED:
        lines.append(f"and {len(blocks) - _LISTED} more parts; see .parts")
    return lines


def _blocks(found: PlanDiff) -> list[list[str]]:
    """Return each part as lines; those that differ only in numbers (the layers) as one."""
    known = KnownNames(found.known)
    alike: dict[Any, list[ChangedPart]] = {}
    for part in found.parts:
        names = tuple(families(known.covered(part.parameters)))
        what = tuple((c.setting, c.first, c.last, _kinds(c)) for c in part.changes)
        alike.setdefault((names, what), []).append(part)
    return [_block(parts, known) for parts in alike.values()]


def _kinds(change: Change) -> tuple[Any, ...]:
    """Return what must agree for changes to be told as one: words; numbers become ranges."""
    values = (*change.before, *change.after)
    return tuple(None if _is_number(value) else value for value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, float)


def _block(parts: list[ChangedPart], known: KnownNames) -> list[str]:
    names = [name for part in parts for name in part.parameters]
    numbers = sum(part.numbers for part in parts)
    plural = "s" if len(names) != 1 else ""
    head = f"{listed(known.folded(names))} ({len(names):,} parameter{plural}, {numbers:,} numbers)"
    width = max(len(change.setting) for change in parts[0].changes)
    lines = [head]
    for place, change in enumerate(parts[0].changes):
        alike = [part.changes[place] for part in parts]
        lines.append(f"  {change.setting:<{width}}  {_text(alike)}")
    return lines


def _text(alike: list[Change]) -> str:
    change = alike[0]
    first, last = (_pair(alike, end) for end in (0, 1))
    if not _is_number(change.before[0]) and change.setting != "trains":
        return first
    where = f"step {change.first}"
    if change.first != change.last:
        dense = change.steps == change.last - change.first + 1
        where = f"steps {change.first} to {change.last}"
        where += "" if dense else f" ({change.steps:,} of them)"
    if first == last:
        return f"{where}: {first}"
    return f"{where}: {first} at the first, {last} at the last"


def _pair(alike: list[Change], end: int) -> str:
    return f"{_range([c.before[end] for c in alike])} → {_range([c.after[end] for c in alike])}"


def _range(values: list[Any]) -> str:
    if _is_number(values[0]):
        low, high = number(min(values)), number(max(values))
        return low if low == high else f"{low}…{high}"
    return _WORDS.get(values[0], str(values[0]))


_WORDS: Mapping[Any, str] = {True: "trains", False: "frozen", None: "none"}
