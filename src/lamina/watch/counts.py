"""What was seen of a parameter, and of a parameter group, under one optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field

#: a rise in one step that is told; tenfold itself is a known way to warm up in two stages
_JUMP = 10.5


@dataclass
class ParamSeen:
    """What was seen of a parameter under one optimizer."""

    shape: tuple[int, ...]
    #: its group as the record names it, and whether it trained at the last close look
    group: str
    trains: bool = True
    received: bool = False
    #: steps in which it trained and had no gradient, before the first one
    waited: int = 0
    measured: int = 0
    largest_grad: float = 0.0
    asked: int = 0
    moved: bool = False
    #: looks at which it was frozen and had a gradient
    stale: int = 0
    frozen_moved: bool = False

    @property
    def is_matrix(self) -> bool:
        """Return whether it has at least two dimensions, unlike biases and norms."""
        return len(self.shape) > 1


@dataclass
class GroupSeen:
    """What was seen of the lr of a parameter group."""

    label: str
    steps: int = 0
    zero: int = 0
    lr: float | None = None
    #: the highest lr so far, and whether it has ever fallen: a warmup only rises
    peak: float = 0.0
    fell: bool = False
    jump: tuple[int, float, float] | None = None
    negative: tuple[int, float] | None = None
    #: update-to-weight ratios
    ratios: list[float] = field(default_factory=list)

    def note(self, step: int, lr: float) -> None:
        """Take in the lr of a step."""
        self.steps += 1
        self.zero += lr == 0
        if lr < 0 and self.negative is None:
            self.negative = (step, lr)
        old, self.lr = self.lr, lr
        if old is not None and old > 0:
            # A restart goes no higher than before.
            if lr > _JUMP * old and self.fell and lr > 1.01 * self.peak:
                self.jump = self.jump or (step, old, lr)
            self.fell |= lr < old
        self.peak = max(self.peak, lr)
