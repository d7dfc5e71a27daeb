"""Steps on an accelerator: whether one was taken is decided there, and read one step later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import torch

from .._util.blocks import PLAIN
from .._util.host_copy import HostCopy
from .._util.tensors import waits
from ..algorithms.base import Batch
from ..gradients.nonfinite import DeferredChecks

#: receives numbers of a step that was taken, once they have come from the device
Receiver = Callable[[list[float]], None]


@dataclass(eq=False)
class PendingStep:
    """A step of which the host does not know yet whether the device has taken it.

    `step` is its number; `applied` and `norms` are what the optimizer showed before it; `begun` the
    entries of the state that began with it, which must go if it was not taken. `published` says
    whether the values of the next step are out already.
    """

    step: int
    checks: DeferredChecks
    norms: Mapping[str, torch.Tensor]
    applied: dict[str, dict[str, Any]]
    begun: list[tuple[torch.Tensor, str]] = field(default_factory=list)
    published: bool = False
    _flag: torch.Tensor | None = None
    _numbers: list[torch.Tensor] = field(default_factory=list)
    _receivers: list[tuple[int, Receiver]] = field(default_factory=list)
    _copy: HostCopy | None = None
    _read: list[float] = field(default_factory=list)

    @property
    def has_result(self) -> bool:
        """Whether the device has anything to tell about the step."""
        return self._flag is not None or bool(self._numbers)

    @property
    def is_open(self) -> bool:
        """Whether the result is on its way, and was not read yet."""
        return self._copy is not None

    def decide(self, batches: Sequence[Batch]) -> None:
        """Give every batch the flag of the step, on its device; nothing is read."""
        if not self.checks:
            return
        flags: dict[torch.device, torch.Tensor] = {}
        for batch in batches:
            device = batch.params[0].device
            if self._flag is None:
                self._flag = flags[device] = self.checks.found_inf(device)
            elif device not in flags:
                flags[device] = self._flag.to(device)
            batch.found_inf = flags[device]

    def request(self, numbers: Sequence[torch.Tensor], receiver: Receiver) -> None:
        """Send scalars to the host with the flag, for a receiver that wants them if it is 0."""
        self._numbers += numbers
        self._receivers.append((len(numbers), receiver))

    def send(self) -> None:
        """Begin to copy the flag and the numbers to the host, without waiting."""
        first = self._numbers[0] if self._flag is None else self._flag
        flag = torch.zeros((), device=first.device) if self._flag is None else self._flag
        numbers = [number.to(flag.device) for number in self._numbers]
        self._copy = HostCopy(torch.stack([flag, *numbers]))
        self._numbers.clear()

    def was_taken(self) -> bool:
        """Return whether the step was taken; waits until it is over.

        One step later that is long past.
        """
        assert self._copy is not None
        flag, *self._read = self._copy.read()
        self._copy = None
        return not flag

    def deliver_numbers(self) -> None:
        """Give the numbers of a step that was taken to those who wait for them."""
        numbers = iter(self._read)
        for count, receiver in self._receivers:
            receiver([*islice(numbers, count)])


def may_stay_on_device(batches: Sequence[Batch]) -> bool:
    """Return whether the device can decide alone about a step over these batches.

    Not where a tensor is on the CPU, which would wait for the flag, where a gradient is sparse,
    which cannot be read without waiting, or for tensors of other classes, which nothing can be
    selected in.
    """
    if not batches or not waits(batches[0].params[0].device):
        return False
    return all(map(_may_stay, batches))


def _may_stay(batch: Batch) -> bool:
    device = batch.params[0].device
    if not waits(device) or any(grad.layout is not torch.strided for grad in batch.grads):
        return False
    if any(tensor.device != device for tensor in chain(batch.params, batch.steps)):
        return False
    return {*map(type, batch.params), *map(type, batch.grads)} <= {*PLAIN}
