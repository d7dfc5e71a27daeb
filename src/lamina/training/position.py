"""Where a run stands in its data, and the random states that bring it back there.

Accelerate's loader reads one batch ahead: what the main process draws for a batch (an augmentation,
say) is drawn while the batch before it is asked for, and worker processes draw from a seed that is
drawn when the epoch begins. Three states therefore bring a run back: the one in which the epoch
began, from which the batches already used are read again; the one in which the last of them was
asked for; and the one after its step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .._util.randomness import Randomness, State


@dataclass(frozen=True)
class Position:
    """How far a run is: the epoch, the batches of it that were used, and the random states.

    `validated`: whether the model was measured after them. `after` is None until something may
    draw from the random sources again.
    """

    epoch: int = 0
    batches: int = 0
    validated: bool = False
    start: State | None = None
    before: State | None = None
    after: State | None = None

    def settled(self, randomness: Randomness) -> Position:
        """Return the position with `after` known: the state of now if nothing was drawn since."""
        return self if self.after is not None else replace(self, after=randomness.now())
