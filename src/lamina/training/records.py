"""What a run tells: plain frozen records, and who listens to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step: the values that were applied, by group, as the optimizer says."""

    step: int
    epoch: int
    loss: float
    lr: dict[str, float]
    norms: dict[str, float]
    examples: int
    seconds: float


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
