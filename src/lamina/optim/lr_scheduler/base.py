"""The base of the drop-in schedulers: torch's interface, without its traps."""

from __future__ import annotations

import copy
import os
import types
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from ..._util.notices import warn
from ...errors import ScheduleError
from ...schedules.pictures import plot
from .groups import attach, keep_config, watch_steps
from .ledger import Group, Ledger, Multiplier, Rate, innermost, ledger_of, own

_EPOCH_IS_DEPRECATED: str = torch_schedulers.EPOCH_DEPRECATION_WARNING


class LRScheduler(torch_schedulers.LRScheduler):
    """The base of schedulers; a scheduler of one's own overrides `get_lr`, as in torch.

    Args:
        optimizer: any optimizer of lamina or torch.
        last_epoch: -1 to begin; else the index of the last epoch of a run that goes on.
        verbose: report each change of a learning rate, through `logging` as "lamina".
    """

    #: arguments of the constructor; loading a state does not replace them
    _config: ClassVar[tuple[str, ...]] = ()
    _hidden: ClassVar[tuple[str, ...]] = (
        *("optimizer", "_verbose", "_ledger", "_multiplier", "_previous"),
    )
    #: whether it goes on from what schedulers that were there before have left
    _relative: ClassVar[bool] = False

    _verbose: bool = False
    _ledger: Ledger
    #: its factor in the ledger, if it has one
    _multiplier: Multiplier | None = None

    # torch's constructor replaces `optimizer.step`, which fails for whatever is not a method.
    def __init__(self, optimizer: Optimizer, last_epoch: int = -1, verbose: object = False) -> None:
        self._verbose = verbose is True
        if "_ledger" not in vars(self):  # a subclass may have needed it before
            attach(self, optimizer, last_epoch)
        for index, group in enumerate(optimizer.param_groups):
            if last_epoch == -1:
                group.setdefault("initial_lr", own(group["lr"]))
            elif "initial_lr" not in group:
                raise KeyError(
                    f"{type(self).__name__} was given last_epoch={last_epoch}, but group {index} "
                    "has no 'initial_lr': load the state of the optimizer first, or give its "
                    "groups 'initial_lr', the learning rate that the run began with."
                )
        self._ledger.based()
        self.base_lrs: list[Rate] = [own(group["initial_lr"]) for group in optimizer.param_groups]
        self.last_epoch = last_epoch
        self._initial_step()

    # --- stepping ------------------------------------------------------------------------------

    def _initial_step(self) -> None:
        self._step_count = 0
        if not self._relative:
            self._ledger.overwrite()
        self._is_initial = True
        try:
            self.step()
        finally:
            self._is_initial = False

    def step(self, epoch: float | None = None) -> None:
        """Go on to the next epoch (or step), after `optimizer.step()`.

        Args:
            epoch: go to this one instead, by the closed form; deprecated by torch.
        """
        self._check_order()
        self._step_count += 1
        if epoch is not None:
            warn(_EPOCH_IS_DEPRECATED)
        self._update_lr(epoch)

    def _check_order(self) -> None:
        """Warn if the first step comes before the optimizer's."""
        if self._step_count != 1 or not watch_steps(self.optimizer):
            return  # the optimizer, a copy perhaps, is watched from now on
        if not getattr(innermost(self.optimizer), "_opt_called", False):
            warn(
                "Detected call of `lr_scheduler.step()` before `optimizer.step()`, which skips "
                "the first value of the schedule; call optimizer.step() first."
            )

    def _update_lr(self, epoch: float | None = None) -> None:
        before = self.last_epoch
        ledger = self._read()
        self._get_lr_called_within_step = True
        try:
            self.last_epoch = before + 1 if epoch is None else epoch  # type: ignore[assignment]
            closed = None if epoch is None else getattr(self, "_get_closed_form_lr", None)
            values = ledger.without_multipliers(closed or self.get_lr)
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
        ledger.write(self, values, made=self._is_initial)

    def get_lr(self) -> list[Rate]:
        """Return the learning rate of each group at `last_epoch`; called by `step`."""
        raise NotImplementedError

    def _write_others(self) -> None:
        """Write what else than learning rates belongs to the last epoch."""

    # --- the groups ----------------------------------------------------------------------------

    def _read(self) -> Ledger:
        """Take in what happened to the groups since the last write; return the ledger."""
        groups, known = self.optimizer.param_groups, len(self.base_lrs)
        if len(groups) < known:
            raise ScheduleError(
                f"{type(self).__name__} knows {known} groups, but the optimizer has "
                f"{len(groups)}; groups cannot be taken away from under a scheduler."
            )
        ledger = self._ledger = ledger_of(self.optimizer, getattr(self, "_ledger", None))
        if self._multiplier is not None:
            ledger.join(self._multiplier)
        ledger.read(groups)
        for index in range(known, len(groups)):
            self._join(index, groups[index])
            self.base_lrs.append(own(groups[index]["initial_lr"]))
        return ledger

    def _join(self, index: int, group: Group) -> None:
        """Take in a group that was added later; raise before anything was changed."""

    # --- looking ahead -------------------------------------------------------------------------

    def at(self, step: int) -> list[float]:
        """Return the learning rate of every group at any step, counted from 0; changes nothing.

        As if this were the only scheduler of the optimizer.

        Raises:
            ScheduleError: if the scheduler has no closed form.
        """
        raise ScheduleError(
            f"{type(self).__name__} has no closed form: its values depend on what happens in the "
            "run, so it cannot be asked for a step."
        )

    def plot(self, path: str | os.PathLike[str] | None = None, steps: int | None = None) -> Any:
        """Draw the learning rate of every group (needs matplotlib).

        Args:
            path: a file to write, such as "lr.png".
            steps: how many; by default the planned length, where there is one.

        Returns:
            A `matplotlib.figure.Figure`.
        """
        name = type(self).__name__
        if isinstance(path, int):
            raise ScheduleError(f"{name}.plot was given the path {path}; pass steps={path}.")
        steps = self._planned() if steps is None else steps
        if steps is None:
            raise ScheduleError(f"{name} has no planned end; pass steps=.")
        groups = self.optimizer.param_groups
        curves = {
            f"{index} {group.get('name', '')}".strip(): partial(self._curve, index)
            for index, group in enumerate(groups)
        }
        return plot(curves, steps, path, "learning rate")

    def _curve(self, index: int, places: Any) -> Any:
        """Return the learning rate of a group at an array of steps."""
        return np.array([self.at(int(place))[index] for place in places])

    def _planned(self) -> int | None:
        """Return how many steps the schedule was planned for, if that is known."""
        return None

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the optimizer, under torch's keys."""
        kept = {key: value for key, value in self.__dict__.items() if key not in self._hidden}
        return {key: list(v) if isinstance(v, list) else v for key, v in kept.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a saved scheduler was; what this one's constructor was given stays.

        The optimizer may be restored before or after. Where only the scheduler is, the groups
        get the learning rates that they had when it was saved. Warns if the saved scheduler was
        given other arguments.
        """
        self._load(state_dict)
        self._ledger.resume(self, self._last_lr)
        self._write_others()

    def _load(self, state_dict: dict[str, Any]) -> None:
        """Load a state, but leave the groups as they are."""
        saved = {key: value for key, value in state_dict.items() if key not in self._hidden}
        previous = copy.copy(self)
        previous.__dict__.update(saved)
        changed = keep_config(self, saved)
        self.__dict__.update({k: list(v) if isinstance(v, list) else v for k, v in saved.items()})
        if changed:
            self._go_on_from(previous)

    def _go_on_from(self, previous: Self) -> None:
        """Continue after the state of a scheduler with other arguments was loaded."""


def state_of(function: Any) -> dict[str, Any] | None:
    """Return what a state keeps of a callable object; None of a plain function."""
    if function is None or isinstance(function, types.FunctionType):
        return None
    return dict(getattr(function, "__dict__", {}))


class PlannedLR(LRScheduler):
    """The base of lamina's own schedulers of one formula, whose `get_lr` is not for users."""

    def get_lr(self) -> list[Rate]:
        if not self._get_lr_called_within_step:
            warn("To read the learning rates, call get_last_lr().")
            return self.get_last_lr()
        return self._next_lr()

    def _next_lr(self) -> list[Rate]:
        """Return the learning rate of each group at `last_epoch`, by the closed form."""
        return list(self.at(self.last_epoch))
