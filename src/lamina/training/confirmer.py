"""Keeps what was applied, to compare it with what was announced when the run is over."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

from ..optimizer.optimizer import Optimizer
from ..preview import Preview
from ..preview.verify import Confirmation, confirm
from .records import Event, StepRecord, Validation


class Confirmer:
    """The lr of every group at every step, as eight bytes each.

    Args:
        first: the step at which it begins.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.lr: dict[str, array[float]] = {}

    def on_step(self, record: StepRecord) -> None:
        self.note(record.lr)

    def note(self, lr: Mapping[str, float]) -> None:
        """Keep the lr of the next step."""
        for name, value in lr.items():
            self.lr.setdefault(name, array("d")).append(value)

    def on_event(self, event: Event) -> None:
        """Keep nothing of it."""

    def on_validation(self, result: Validation) -> None:
        """Keep nothing of it."""

    def confirm(self, optimizer: Optimizer) -> Confirmation:
        """Compare with the plan, given what the metrics of this run did to it."""
        return confirm(Preview(optimizer.resolved, optimizer._feedback), self.lr, first=self.first)
