"""Which saved entry is which parameter: by name, by a new name, or by position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .._util.text import quoted
from ..errors import StateError, did_you_mean
from ..model.parameters import ParamInfo, clean_names
from .schema import Entry, Saved, reading


@dataclass
class Matched:
    """Saved entries under the names of the live parameters.

    `asked` are the saved names that the user asked to leave out.
    """

    entries: dict[str, Entry]
    by: str = "names"
    renamed: list[tuple[str, str]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@reading("the saved names")
def match(
    saved: Saved, infos: Sequence[ParamInfo], renamed: Mapping[str, str | None] | None
) -> Matched:
    """Give every saved entry the name of a live parameter, where it has one.

    Args:
        saved: the state.
        infos: the live parameters in the order of the model.
        renamed: from the saved name of a parameter or module to the present one; None: leave out.

    Raises:
        StateError: if the names or positions cannot be matched as asked.
    """
    if saved.names is None:
        if renamed:
            raise StateError("renamed= was given, but the saved state has no parameter names.")
        return Matched(_by_position(saved, infos), "positions")
    live = {name: info.name for info in infos for name in info.names}
    matched = Matched({})
    targets = _targets(saved.names, live, renamed or {})
    origin: dict[str, str] = {}
    for name, entry in zip(saved.names, saved.entries, strict=True):
        target = targets.get(name, name)
        if target is None:
            matched.asked.append(name)
            continue
        target = live.get(target, target)
        if target in origin:
            raise StateError(
                f"{origin[target]!r} and {name!r} of the saved state are both {target!r} here; "
                f"leave one out with renamed={{{name!r}: None}}."
            )
        origin[target] = name
        matched.entries[target] = entry
        if name in targets:
            matched.renamed.append((name, target))
    if matched.entries and not any(info.name in matched.entries for info in infos):
        raise StateError(
            f"none of the {len(matched.entries)} saved parameters ({quoted(matched.entries)}) is "
            f"one of the {len(infos)} of this model ({quoted(info.name for info in infos)}); "
            f"nothing was loaded. {_proposal([*matched.entries], infos)}"
        )
    return matched


def _proposal(saved: Sequence[str], infos: Sequence[ParamInfo]) -> str:
    """Propose a fix for a state without a known name, such as a prefix on one side."""
    live = [info.name for info in infos]
    for theirs, mine, longer in ((saved, live, True), (live, saved, False)):
        prefix = _prefix(theirs, mine)
        if prefix:
            parts = dict.fromkeys(name.split(".")[0] for name in mine)
            longs = [(f"{prefix}.{part}", part) for part in parts]
            pairs = longs if longer else [(part, long) for long, part in longs]
            return f"Where only the names differ, load with renamed={dict(pairs)!r}."
    return (
        "If it is the state of this model under other names, load with "
        "renamed={saved name: name here}; else use another state."
    )


def _prefix(long: Sequence[str], short: Sequence[str]) -> str:
    """Return the prefix by which names of one list differ from the other's, or ""."""
    known = set(short)
    parts = long[0].split(".")
    for size in range(1, len(parts)):
        prefix = ".".join(parts[:size])
        inner = [name.removeprefix(f"{prefix}.") for name in long if name.startswith(f"{prefix}.")]
        if inner and known <= set(inner):
            return prefix
    return ""


def check_renamed(renamed: Any) -> None:
    """Raise `StateError` unless it is a dict from saved to present names."""
    if not isinstance(renamed, Mapping) or not all(
        isinstance(old, str) and (new is None or isinstance(new, str))
        for old, new in renamed.items()
    ):
        raise StateError(
            f"renamed={renamed!r}: expected a dict from saved to present names, such as "
            "{'old.encoder': 'encoder', 'head.weight': None}."
        )


def renamed_cleanly(
    renamed: Mapping[str, str | None], names: Iterable[str]
) -> dict[str, str | None]:
    """Remove what wrappers add to names, unless a name is in the state as it is.

    Args:
        renamed: from saved to present names, as they were given.
        names: the clean names in the state.
    """
    check_renamed(renamed)
    known = set(_paths(names))
    found: dict[str, str | None] = {}
    for old, new in renamed.items():
        clean = old if old in known else clean_names([old])[old]
        if clean in found:
            raise StateError(
                f"renamed: {clean!r} of the saved state is given twice, as {old!r} too."
            )
        found[clean] = new
    return found


def renamed_to(name: str, renamed: Mapping[str, str | None]) -> str | None:
    """Return the present name of a saved one, None if it is left out; the longest path wins."""
    hit = [old for old in renamed if name == old or name.startswith(f"{old}.")]
    if not hit:
        return name
    old = max(hit, key=len)
    new = renamed[old]
    return None if new is None else new + name[len(old) :]


def _targets(
    names: Sequence[str], live: Mapping[str, str], renamed: Mapping[str, str | None]
) -> dict[str, str | None]:
    """Return the new name of each saved name that `renamed` speaks of; the longest path wins."""
    renamed = renamed_cleanly(renamed, names)
    found: dict[str, str | None] = {}
    for old in sorted(renamed, key=len):
        new = renamed[old]
        hit = [name for name in names if name == old or name.startswith(f"{old}.")]
        if not hit:
            raise StateError(
                f"renamed: the saved state has no parameter or module {old!r}."
                f"{did_you_mean(old, _paths(names))}"
            )
        moved = {name: renamed_to(name, {old: new}) for name in hit}
        if new is not None and not any(target in live for target in moved.values()):
            raise StateError(
                f"renamed: the model has no parameter or module {new!r} that fits {old!r}."
                f"{did_you_mean(new, _paths(live))}"
            )
        found |= moved
    return found


def _paths(names: Iterable[str]) -> list[str]:
    """Return all names, and the modules that they lie in."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        found |= dict.fromkeys(".".join(parts[:size]) for size in range(1, len(parts) + 1))
    return list(found)


def _by_position(saved: Saved, infos: Sequence[ParamInfo]) -> dict[str, Entry]:
    """Return entries in the order of the model's parameters, if number and shapes agree."""
    fix = (
        "Save it with names (torch takes model.named_parameters()), or from an optimizer that "
        "was built by a plan."
    )
    if len(saved.entries) != len(infos):
        raise StateError(
            f"the saved state has no parameter names, and {len(saved.entries)} parameters where "
            f"the model has {len(infos)}; so it cannot be matched by position either. {fix}"
        )
    for place, (info, entry) in enumerate(zip(infos, saved.entries, strict=True)):
        for key, value in (entry.values or {}).items():
            if _misfits(key, value, info):
                raise StateError(
                    "the saved state has no parameter names, and by position number "
                    f"{place} is {info.name!r} of shape {info.shape}, whose saved {key} has shape "
                    f"{tuple(value.shape)}. {fix}"
                )
    return {info.name: entry for info, entry in zip(infos, saved.entries, strict=True)}


def _misfits(key: str, value: Any, info: ParamInfo) -> bool:
    """Return whether a saved value has a size that no state of the parameter has.

    Factors, as Adafactor's, have some of its dimensions, in their order.
    """
    if not isinstance(value, torch.Tensor) or key == "step" or key in _WHOLE or value.ndim == 0:
        return False
    if value.numel() == info.numel:
        return tuple(value.shape) != info.shape
    sizes = iter(info.shape)
    return not all(size in sizes for size in value.shape if size != 1)


#: entries of L-BFGS, which are of all parameters
_WHOLE = ("d", "prev_flat_grad")
