"""All that was seen of a script, as the findings need it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..model.finding import Finding
from ..record import Record
from .gradients import ClipWatch, ScalerWatch
from .names import Models
from .schedules import ScheduleWatch
from .steps import StepWatch


@dataclass
class Sightings:
    """What was seen so far.

    `outside` holds trainable parameters with a gradient that were in no optimizer, and in how many
    looks; `replaced` those that took the place of a parameter that an optimizer still updates.
    """

    models: Models
    record: Record
    watches: list[StepWatch] = field(default_factory=list)
    schedules: list[ScheduleWatch] = field(default_factory=list)
    clips: dict[str, ClipWatch] = field(default_factory=dict)
    scalers: dict[str, ScalerWatch] = field(default_factory=dict)
    #: findings that need no count, in the order in which they came
    found: dict[Finding, None] = field(default_factory=dict)
    outside: dict[str, int] = field(default_factory=dict)
    replaced: dict[str, None] = field(default_factory=dict)
    loss_nonfinite: int | None = None

    def find(self, finding: Finding) -> None:
        """Keep a finding, once."""
        if finding not in self.found:
            self.found[finding] = None
            self.record.finding(finding)

    def left_out(self) -> dict[str, tuple[int, ...]]:
        """Return the parameters of known models that are in no optimizer, with their shapes."""
        held = {name for watch in self.watches for name in watch.params}
        return {
            name: shape
            for root in self.models.roots
            for name, shape in root.shapes.items()
            if name not in held
        }
