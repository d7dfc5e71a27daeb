"""A read-only scheduler for trainers that insist on having one."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class SchedulerView(LRScheduler):
    """Looks like a scheduler and changes nothing: the plan moves every value itself."""

    def __init__(self, optimizer: Optimizer) -> None:
        # torch's constructor would write `initial_lr` into the groups and patch `step`.
        self.optimizer = optimizer
        self.base_lrs = list(self.get_last_lr())
        self._step_count = 1

    @property
    def last_epoch(self) -> int:  # type: ignore[override]
        """The step that comes next."""
        return self.optimizer.clock  # type: ignore[attr-defined,no-any-return]

    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """Return the learning rate that each group had in the step just done.

        Before the first step (of a run, or after a resume): the one that it will have.
        """
        applied = self.optimizer.applied  # type: ignore[attr-defined]
        groups = self.optimizer.param_groups
        return [float(applied.get(group["name"], group)["lr"]) for group in groups]

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Return the same as `get_last_lr`."""
        return self.get_last_lr()

    def step(self, epoch: int | None = None) -> None:
        """Do nothing: `optimizer.step()` moves the values."""

    def state_dict(self) -> dict[str, Any]:
        """Do nothing: the optimizer saves its clock."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: the optimizer loads its clock."""
