"""The plan owns what it publishes: a foreign write is an error, never silently lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from operator import itemgetter
from typing import Any

from .._util.numbers import is_number
from ..errors import OwnershipError

_MISSING = object()


class WriteGuard:
    """What every group holds since it was published, in the form that is compared fastest.

    All groups are compared at every step: of a thousand of them, most of the work on the host.
    """

    def __init__(self) -> None:
        self._readers: list[Callable[[Mapping[str, Any]], Any]] = []
        self._published: list[Any] = []

    def publish(self, values: Mapping[str, Mapping[str, Any]], changed: Iterable[int]) -> None:
        """Remember the values that were written into the groups.

        Args:
            values: those of each group, in order.
            changed: the groups whose values are not those that were published before.
        """
        every = list(values.values())
        if len(every) != len(self._published):
            self._readers, self._published = [len] * len(every), [None] * len(every)
        for index in changed:
            read = self._readers[index] = _reader(tuple(every[index]))
            self._published[index] = read(every[index])

    def is_intact(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether all groups hold these values; False also where it takes a closer look."""
        try:
            held = [read(group) for read, group in zip(self._readers, groups, strict=True)]
            return held == self._published
        except (KeyError, RuntimeError):  # a value is gone, or a tensor of several numbers is new
            return False


@cache
def _reader(keys: tuple[str, ...]) -> Callable[[Mapping[str, Any]], Any]:
    return itemgetter(*keys)


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
