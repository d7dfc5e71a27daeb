"""Numbers that are still on an accelerator: read many at once, later, so that no step waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from .._util.host_copy import HostCopy

#: takes a number that was read: its series, its step, its value
Deliver = Callable[[Any, int, float], None]
#: batches on their way; a device that tells nothing of its copies is waited for beyond that
_MOST_COPIES = 16
Kind = tuple[torch.device, torch.dtype]


class Pending:
    """Collects scalar tensors and delivers their numbers later.

    A full batch is stacked on its device and copied to the host without waiting; the copy is read
    once the device says that it is done. Only `flush` waits, and a backlog of
    many batches.

    Args:
        deliver: called with each number.
        batch: how many tensors of a device are read together.
    """

    def __init__(self, deliver: Deliver, batch: int = 1024) -> None:
        self._deliver = deliver
        self._batch = batch
        self._waiting: dict[Kind, list[tuple[Any, int, torch.Tensor]]] = {}
        self._copies: deque[_Copy] = deque()

    def add(self, series: Any, step: int, value: torch.Tensor) -> None:
        """Take a scalar tensor; the caller changes it no more."""
        kind = (value.device, value.dtype)
        waiting = self._waiting.setdefault(kind, [])
        waiting.append((series, step, value.detach().reshape(())))
        if len(waiting) >= self._batch:
            self._send(kind)
            self._receive(wait=len(self._copies) > _MOST_COPIES)

    def push(self) -> None:
        """Send what waits on its way, and deliver what has arrived."""
        for kind in list(self._waiting):
            self._send(kind)
        self._receive(wait=len(self._copies) > _MOST_COPIES)

    def flush(self) -> None:
        """Deliver everything, which waits for the accelerator."""
        for kind in list(self._waiting):
            self._send(kind)
        self._receive(wait=True)

    def _send(self, kind: Kind) -> None:
        waiting = self._waiting.pop(kind, [])
        if waiting:
            self._copies.append(_Copy(waiting))

    def _receive(self, wait: bool) -> None:
        while self._copies and (wait or self._copies[0].done):
            copy = self._copies.popleft()
            for (series, step, _), number in zip(copy.entries, copy.read(), strict=True):
                self._deliver(series, step, number)


class _Copy:
    """A batch of numbers on its way to the host."""

    def __init__(self, entries: list[tuple[Any, int, torch.Tensor]]) -> None:
        self.entries = entries
        with torch.no_grad():
            self._numbers = HostCopy(torch.stack([value for _, _, value in entries]))

    @property
    def done(self) -> bool:
        """Whether reading it waits for nothing."""
        return self._numbers.done

    def read(self) -> list[float]:
        """Return the numbers; waits until they are there."""
        return self._numbers.read()
