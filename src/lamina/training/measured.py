"""What was measured of a step, for the record of the run."""

from __future__ import annotations

from ..optimizer.optimizer import Optimizer
from ..record.record import RecordEvent
from ..record.rows import Row
from ..record.writers import measured


class Measured:
    """Keeps what the recorder of an optimizer measured until the loop tells of that step.

    Args:
        optimizer: that of the run.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._rows: dict[int, Row] = {}
        self._recorder = optimizer.recorder(self)

    def take(self, step: int) -> dict[str, dict[str, float]]:
        """Return what was measured in a step, by group; empty if it was not one of those."""
        self._recorder.flush()
        row = self._rows.pop(step, None)
        self._rows = {number: its for number, its in self._rows.items() if number > step}
        return {} if row is None or step % self._recorder.every else measured(row)

    def write(self, row: Row) -> None:
        """Keep the numbers of a step."""
        if row.groups:
            self._rows[row.step] = row

    def event(self, event: RecordEvent) -> None:
        """Keep no event; the loop tells of its own."""

    def close(self) -> None:
        """Keep what is there."""
