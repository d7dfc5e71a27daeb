"""The plan owns what it publishes: a foreign write is an error, never silently lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._util.numbers import is_number
from ..errors import OwnershipError

_MISSING = object()


def refuse_foreign_writes(
    published: Mapping[str, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], step: int
) -> None:
    """Raise `OwnershipError`, naming group and values, if a group is not as published."""
    for (name, values), group in zip(published.items(), groups, strict=True):
        for key, value in values.items():
            now = group.get(key, _MISSING)
            if now is not value and now != value:
                given = "nothing" if now is _MISSING else repr(now)
                raise OwnershipError(
                    f"group {name!r} has {key}={given}, but the plan published {key}={value!r} "
                    f"for step {step}: {_cause_and_fix(name, key, now, value, group)}"
                )


def _cause_and_fix(name: str, key: str, now: Any, value: Any, group: Mapping[str, Any]) -> str:
    """Return who wrote a value and what to do; torch schedulers leave `initial_lr` in groups."""
    if "initial_lr" in group:
        return (
            "a torch scheduler that was made for this optimizer wrote it (a trainer makes one by "
            "itself). The plan moves the values: make no scheduler, and give a trainer that wants "
            "one optimizer.scheduler_view(), which changes nothing."
        )
    way = ""
    if is_number(now) and is_number(value):
        also = " (which its schedule still multiplies)" if key == "lr" else ""
        way = f", or call optimizer.override({key}={now!r}, rule={name!r}){also}"
    return (
        f"something else wrote it (a scheduler, or group[{key!r}] = ...). Instead of a scheduler "
        f"use optimizer.scheduler_view(); instead of writing by hand, change the plan{way}."
    )
