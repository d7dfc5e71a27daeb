"""What the table, the picture and other reports read of a preview."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..model.finding import Finding
from ..resolve.resolved import Resolved
from ..resolve.timeline import Feedback, Values
from ..runtime.flags import Flags
from ..schedules.duration import Run
from ..state.extend import Resumed

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """One parameter group over the run; numbers are None where they do not exist.

    `first` and `last` are the first and the last step at which the group trains. `lr_start` and
    `lr_end` are the lr at these two, `lr_peak` the largest lr of all steps; the same two steps
    give `weight_decay` and `weight_decay_end`. `ties` are the names of each tied parameter in it.
    `gradients` are the operations on gradients, in
    words, and `scope` the rule whose parameters they see together. `lr` and `active` are samples
    at `Preview.steps`; lr is 0 while the group is frozen.
    """

    group: str
    optimizer: str
    rules: tuple[str, ...]
    tensors: int
    parameters: int
    lr_start: float | None
    lr_peak: float | None
    lr_end: float | None
    weight_decay: float | None
    weight_decay_end: float | None
    gradients: str
    scope: str | None
    thaw: str
    first: int | None
    last: int | None
    ties: tuple[tuple[str, ...], ...]
    lr: Floats = field(repr=False, compare=False)
    active: npt.NDArray[np.bool_] = field(repr=False, compare=False)

    @property
    def clip(self) -> str:
        """The clip threshold and whose common norm it limits; empty without clipping."""
        limit = self.gradients.removeprefix("clip_norm ")
        return f"{limit} ({self.scope})" if self.scope else ""


class Shown(Protocol):
    """A preview, as far as the modules that show it need to know; see `Preview`."""

    resolved: Resolved
    feedback: Feedback
    flags: Flags
    resumed: Resumed | None

    @property
    def run(self) -> Run:
        """The length of the run."""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is legal in the plan but suspicious."""

    @property
    def peaks(self) -> tuple[tuple[float, int], ...]:
        """The largest lr of each group, and the first step that has it."""

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """The steps at which the rows are sampled."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """One row for each parameter group."""

    def values(self, step: Any) -> Values:
        """Return every value at a step or an array of steps."""
