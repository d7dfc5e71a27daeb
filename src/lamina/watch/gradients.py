"""What is seen of clipping and of a GradScaler."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .._util.tensors import is_dtensor
from .._util.text import listed
from ..model.finding import Finding

#: clip norms that are read together
_BATCH = 32
#: calls before anything is said of how often a clip acts
_ENOUGH = 20
#: attempts in which a GradScaler looks for its scale
_SETTLING = 10


@dataclass
class ClipWatch:
    """The calls that clip the same parameters by norm."""

    name: str
    calls: int = 0
    acted: int = 0
    #: calls that found no gradient
    empty: int = 0
    largest: float = 0.0
    limit: float = 0.0
    frozen: dict[str, int] = field(default_factory=dict)
    scaled: int = 0
    _pending: list[torch.Tensor] = field(default_factory=list)

    def note(self, norm: Any, limit: float) -> None:
        """Take in the norm of a call; it is read later."""
        self.calls += 1
        self.limit = limit
        # To read a sharded norm, all processes would have to take part.
        if isinstance(norm, torch.Tensor) and norm.numel() == 1 and not is_dtensor(norm):
            self._pending.append(norm.detach())
        if len(self._pending) >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Read the norms that wait."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        for norm in torch.stack([each.reshape(()).float() for each in pending]).tolist():
            self.acted += norm > self.limit
            self.empty += norm == 0
            if norm > self.largest:
                self.largest = norm

    def conclude(self) -> Iterator[Finding]:
        """Find what the calls mean."""
        self.flush()
        frozen = [name for name, looks in self.frozen.items() if looks > 1]
        if frozen:
            yield Finding(
                "clip-counts-frozen",
                f"the clip norm counts the left-over gradients of {listed(frozen)}, which is "
                "frozen: the others are clipped by them.",
                "Set .grad = None where you freeze, or clip only what trains: "
                "[p for p in model.parameters() if p.requires_grad].",
            )
        if self.scaled > 1:
            yield Finding(
                "clip-scaled-gradients",
                f"the gradients of {self.name} were clipped to {self.limit:g} while they were "
                f"still multiplied by the scale of the GradScaler, in {self.scaled} of "
                f"{self.calls} calls.",
                "Call scaler.unscale_(optimizer) before clipping.",
            )
            return
        if self.calls < _ENOUGH:
            return
        if self.empty > 0.5 * self.calls:
            yield Finding(
                "clip-nothing",
                f"clipping {self.name} to {self.limit:g} found no gradient in {self.empty} of "
                f"{self.calls} calls, so that the steps are not clipped.",
                "Clip between backward() and step(), before zero_grad().",
            )
        elif self.acted >= self.calls:
            yield Finding(
                "clip-always",
                f"clipping {self.name} to {self.limit:g} acted in all {self.calls} calls (norm up "
                f"to {self.largest:.3g}): every step has the same length, whatever the gradient.",
                "If that is not meant, clip at a norm that most steps stay below.",
            )
        elif self.largest < self.limit / 10:
            yield Finding(
                "clip-never",
                f"clipping {self.name} to {self.limit:g} never acted in {self.calls} calls: the "
                f"largest norm was {self.largest:.3g}.",
                "If it is to catch spikes, clip at a few times the usual norm.",
            )


@dataclass
class ScalerWatch:
    """A GradScaler with one optimizer."""

    optimizer: str
    attempts: int = 0
    skipped: int = 0
    late: int = 0

    def note(self, skipped: bool) -> None:
        """Count an attempt to step."""
        self.attempts += 1
        self.skipped += skipped
        self.late += skipped and self.attempts > _SETTLING

    def conclude(self) -> Iterator[Finding]:
        """Find whether it skips too many steps."""
        after = self.attempts - _SETTLING
        if after >= 10 and self.late > 0.2 * after:
            yield Finding(
                "scaler-skips",
                f"the GradScaler skipped {self.skipped} of {self.attempts} steps of "
                f"{self.optimizer}: their gradients were not finite.",
                "Look for the operation that overflows (a loss in float16, a division by 0); "
                "bfloat16 needs no scaler.",
            )


class Scalers:
    """All GradScalers of a script."""

    def __init__(self) -> None:
        self._scaled: weakref.WeakSet[Any] = weakref.WeakSet()

    def scaled(self, scaler: Any) -> None:
        """Note that a loss was scaled."""
        if scaler.is_enabled():
            self._scaled.add(scaler)

    def updated(self, scaler: Any) -> None:
        """Note the end of a step."""
        self._scaled.discard(scaler)

    @property
    def is_scaling(self) -> bool:
        """Return whether a loss was scaled since the last update."""
        return bool(self._scaled)

    def has_scaled(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the gradients of an optimizer are scaled at this moment."""
        for scaler in self._scaled:
            states = getattr(scaler, "_per_optimizer_states", {})
            stage = states[id(optimizer)]["stage"].name if id(optimizer) in states else "READY"
            if stage == "READY" and scaler.get_scale() != 1.0:
                return True
        return False
