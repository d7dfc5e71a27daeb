"""How the batches of an optimizer step are dealt to the processes.

A step is made of the same examples however many processes there are, so that a run can go on with
another number of them: fewer processes take more batches each; more processes get parts of batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ..errors import StateError


@dataclass(frozen=True)
class Dealing:
    """What each process takes.

    Args:
        accumulate: batches of one process in an optimizer step.
        parts: into how many batches each one that the task makes is cut.
    """

    accumulate: int
    parts: int = 1

    @classmethod
    def of(cls, batches: int, processes: int) -> Dealing:
        """Deal the batches that make a step, as the task cuts them, to so many processes.

        Example:
            >>> Dealing.of(batches=2, processes=1), Dealing.of(batches=2, processes=4)
            (Dealing(accumulate=2, parts=1), Dealing(accumulate=1, parts=2))
        """
        parts = processes // math.gcd(processes, batches)
        return cls(batches * parts // processes, parts)

    def cut(self, loader: DataLoader[Any]) -> None:
        """Let a loader make batches of a part of their size.

        Raises:
            StateError: if its batches cannot be cut into equal parts; it is as it was.
        """
        if self.parts == 1:
            return
        size = loader.batch_size
        sampler = loader.batch_sampler
        reason = ""
        if type(sampler) is not BatchSampler or isinstance(loader.dataset, IterableDataset):
            reason = "its data set or batch sampler makes the batches itself"
        elif size is None or size % self.parts:
            reason = f"a batch of {size} cannot be cut into {self.parts} equal parts"
        if reason:
            raise StateError(
                "with so many processes each would train on a part of a batch, so that a step has "
                f"the examples that it had, but {reason}. Resume with a number of processes that "
                "divides the batches of a step."
            )
        assert isinstance(sampler, BatchSampler)
        sampler.batch_size //= self.parts
