"""What a run tells: plain frozen records, and who listens to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step: the values that were applied, by group, as the optimizer says.

    `norms` are those of the clip scopes. `groups` holds what was measured of each group, in steps
    in which that was done: `grad_norm`, `weight_norm`, `update_norm`, `clip`, `weight_decay`.
    """

    step: int
    epoch: int
    loss: float
    lr: dict[str, float]
    norms: dict[str, float]
    examples: int
    seconds: float
    groups: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """Something that does not happen at every step; `step` is the first it holds for."""

    step: int
    epoch: int
    kind: str
    text: str
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Validation:
    """Averages over all held-out examples, of which there are `examples`."""

    step: int
    epoch: int
    averages: dict[str, float]
    examples: int
    seconds: float


class Listener(Protocol):
    """Anything that wants to know what happens in a run."""

    def on_step(self, record: StepRecord) -> None:
        """Return a step was taken."""

    def on_event(self, event: Event) -> None:
        """Receive an event: a thaw, a freeze, a skipped step, a request to stop."""

    def on_validation(self, result: Validation) -> None:
        """Return the model was measured on the held-out examples."""
