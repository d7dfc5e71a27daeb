"""The plan owns what it publishes: a foreign write is an error, never silently lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import OwnershipError

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
                way = ""
                if _is_number(now) and _is_number(value):
                    way = f", or call optimizer.override({key}={given}, rule={name!r})"
                raise OwnershipError(
                    f"group {name!r} has {key}={given}, but the plan published {key}={value!r} "
                    f"for step {step}: something else wrote it (a scheduler, or "
                    f"group[{key!r}] = ...). Change the plan{way}."
                )


def _is_number(value: Any) -> bool:
    """Whether `override` takes such a value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
