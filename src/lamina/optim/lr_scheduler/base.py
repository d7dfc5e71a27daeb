"""The base of the drop-in schedulers: torch's interface, without its traps."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from ...errors import LaminaWarning, ScheduleError
from ...schedules.pictures import plot
from .groups import Group, Rate, keep_config, own, prepare, write


class LRScheduler(torch_schedulers.LRScheduler):
    """The base of schedulers; a scheduler of one's own overrides `get_lr`, as in torch.

    Args:
        optimizer: any optimizer of lamina or torch.
        last_epoch: -1 to begin; else the index of the last epoch of a run that goes on.
        verbose: report each change of a learning rate, through `logging` as "lamina".
    """

    #: arguments of the constructor; loading a state does not replace them
    _config: ClassVar[tuple[str, ...]] = ()
    _hidden: ClassVar[tuple[str, ...]] = ("optimizer", "_verbose", "_joined", "_previous", "_old")

    _verbose: bool = False
    _joined: Sequence[int] = ()

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1, verbose: object = False) -> None:
        prepare(self, optimizer, last_epoch)
        self._verbose = verbose is True
        super().__init__(optimizer, last_epoch)

    # --- stepping ------------------------------------------------------------------------------

    def _initial_step(self) -> None:
        self._step_count = 0
        self._is_initial = True
        try:
            self.step()
        finally:
            self._is_initial = False

    def step(self, epoch: float | None = None) -> None:
        """Go on to the next epoch (or step), after `optimizer.step()`.

        Args:
            epoch: go to this one instead, by the closed form.
        """
        watched = hasattr(self.optimizer.step, "_wrapped_by_lr_sched")
        if self._step_count == 1 and watched and not getattr(self.optimizer, "_opt_called", False):
            warnings.warn(
                "lr_scheduler.step() was called before optimizer.step(), which skips the first "
                "value of the schedule; call optimizer.step() first.",
                LaminaWarning,
                stacklevel=2,
            )
        self._step_count += 1
        self._update_lr(epoch)

    def _update_lr(self, epoch: float | None = None) -> None:
        before = self.last_epoch
        self._admit()
        self._get_lr_called_within_step = True
        try:
            self.last_epoch = before + 1 if epoch is None else epoch  # type: ignore[assignment]
            closed = None if epoch is None else getattr(self, "_get_closed_form_lr", None)
            values = self.get_lr() if closed is None else closed()
            if len(values) != len(self.optimizer.param_groups):
                raise ScheduleError(
                    f"{type(self).__name__} gave {len(values)} learning rates for "
                    f"{len(self.optimizer.param_groups)} groups; nothing was changed."
                )
        except BaseException:
            self.last_epoch = before
            raise
        finally:
            self._get_lr_called_within_step = False
        write(self, values)
        self._joined = ()

    def get_lr(self) -> list[Rate]:
        """The learning rate of each group at `last_epoch`; called by `step`."""
        raise NotImplementedError

    def _outside(self) -> bool:
        """Whether `get_lr` was called by a user, who wants `get_last_lr`."""
        if not self._get_lr_called_within_step:
            warnings.warn("To read the learning rates, call get_last_lr().", LaminaWarning, 3)
        return not self._get_lr_called_within_step

    # --- groups added later --------------------------------------------------------------------

    def _admit(self) -> None:
        """Take in groups added since the last step; each follows from its own initial lr."""
        groups, known = self.optimizer.param_groups, len(self.base_lrs)
        if len(groups) < known:
            raise ScheduleError(
                f"{type(self).__name__} knows {known} groups, but the optimizer has "
                f"{len(groups)}; groups cannot be taken away from under a scheduler."
            )
        for index in range(known, len(groups)):
            self._join(index, groups[index])
            groups[index].setdefault("initial_lr", own(groups[index]["lr"]))
            self.base_lrs.append(own(groups[index]["initial_lr"]))
        self._joined = range(known, len(groups))

    def _join(self, index: int, group: Group) -> None:
        """What a scheduler keeps for each group; raises before anything was changed."""

    # --- looking ahead -------------------------------------------------------------------------

    def at(self, step: int) -> list[float]:
        """The learning rate of every group at any step, counted from 0; changes nothing.

        As if this were the only scheduler of the optimizer.

        Raises:
            ScheduleError: if the scheduler has no closed form.
        """
        raise ScheduleError(
            f"{type(self).__name__} has no closed form: its values depend on what happens in the "
            "run, so it cannot be asked for a step."
        )

    def plot(self, steps: int | None = None, path: str | os.PathLike[str] | None = None) -> Any:
        """A picture of the learning rate of every group (needs matplotlib).

        Args:
            steps: how many; by default the planned length, where there is one.
            path: a file to write, such as "lr.png".

        Returns:
            A `matplotlib.figure.Figure`.
        """
        steps = self._planned() if steps is None else steps
        if steps is None:
            raise ScheduleError(f"{type(self).__name__} has no planned end; pass steps=.")
        groups = self.optimizer.param_groups
        names = [f"{index} {group.get('name', '')}".strip() for index, group in enumerate(groups)]
        curves = {
            name: lambda places, index=index: np.array([self.at(int(p))[index] for p in places])
            for index, name in enumerate(names)
        }
        return plot(curves, steps, path, "learning rate")

    def _planned(self) -> int | None:
        """How many steps the schedule was planned for, if that is known."""
        return None

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, under torch's keys."""
        kept = {key: value for key, value in self.__dict__.items() if key not in self._hidden}
        return {key: list(v) if isinstance(v, list) else v for key, v in kept.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a saved scheduler was; what this one's constructor was given stays.

        Warns if that differs from what the saved one was given.
        """
        saved = {key: value for key, value in state_dict.items() if key not in self._hidden}
        previous = copy.copy(self)
        previous.__dict__.update(saved)
        changed = keep_config(self, saved)
        self.__dict__.update({k: list(v) if isinstance(v, list) else v for k, v in saved.items()})
        if changed:
            self._go_on_from(previous)

    def _go_on_from(self, previous: Self) -> None:
        """Called after the state of a scheduler with other arguments was loaded."""
