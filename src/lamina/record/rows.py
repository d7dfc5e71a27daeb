"""What one step did, put together once its numbers have come from the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .pending import Pending

#: rows that may wait for their numbers, and for how many seconds: a kill loses those that wait
_MOST_WAITING = 512
_LONGEST_WAIT = 1.0


@dataclass(eq=False)
class Row:
    """The numbers of one step: by group, and of the run as a whole."""

    step: int
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    #: how many numbers are still to come
    missing: int = 0

    def flat(self) -> dict[str, float]:
        """Return the numbers under names such as `lr/head`."""
        found = dict(self.metrics)
        for group, values in self.groups.items():
            found.update({f"{name}/{group}": value for name, value in values.items()})
        return found


class Rows:
    """Completes rows in their order, as their numbers arrive.

    Args:
        emit: called with each complete row.
        batch: how many tensors are read together.
    """

    def __init__(self, emit: Callable[[Row], None], batch: int = 1024) -> None:
        self._emit = emit
        self._waiting: deque[Row] = deque()
        self._pending = Pending(_fill, batch)
        self._pushed = time.monotonic()

    def add(
        self,
        step: int,
        groups: Mapping[str, Mapping[str, Any]],
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Take the numbers of a step, some of which may be scalar tensors."""
        row = Row(step)
        for group, values in groups.items():
            self._put(row, row.groups.setdefault(group, {}), values)
        self._put(row, row.metrics, metrics or {})
        self._waiting.append(row)
        now = time.monotonic()
        if len(self._waiting) > _MOST_WAITING or now > self._pushed + _LONGEST_WAIT:
            self._pushed = now
            self._pending.push()
        self._emit_complete()

    def flush(self) -> None:
        """Complete and emit all rows, which waits for the accelerator."""
        self._pending.flush()
        self._emit_complete()

    def _put(self, row: Row, into: dict[str, float], values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                into[name] = 0.0  # its place among the others
                row.missing += 1
                self._pending.add((row, into, name), row.step, value)
            else:
                into[name] = float(value)

    def _emit_complete(self) -> None:
        while self._waiting and not self._waiting[0].missing:
            self._emit(self._waiting.popleft())


def _fill(place: tuple[Row, dict[str, float], str], _: int, value: float) -> None:
    row, into, name = place
    into[name] = value
    row.missing -= 1
