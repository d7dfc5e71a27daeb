"""SequentialLR and ChainedScheduler: several schedulers on one optimizer."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from ..._util.compat import update_lr
from ...errors import ScheduleError
from .base import LRScheduler
from .curve import Curve
from .groups import attach
from .lambdas import MultiplicativeLR
from .ledger import Multiplier, Rate, ledger_of, own, report


class _Composed(LRScheduler):
    """Holds schedulers of one optimizer, lamina's or torch's."""

    _hidden: ClassVar[tuple[str, ...]] = (*LRScheduler._hidden, "_schedulers")
    _schedulers: Sequence[Any]

    def _check(self, schedulers: Sequence[Any], optimizer: Optimizer | None) -> None:
        name = type(self).__name__
        if not schedulers:
            raise ScheduleError(f"{name} was given no scheduler; expected at least one.")
        for index, scheduler in enumerate(schedulers):
            if isinstance(scheduler, torch_schedulers.ReduceLROnPlateau):
                raise ScheduleError(
                    f"{name}: scheduler {index} is ReduceLROnPlateau, whose step needs a metric; "
                    "step it by itself."
                )
            if not hasattr(scheduler, "optimizer"):
                raise TypeError(f"{name}: scheduler {index} has no optimizer.")
            if scheduler.optimizer is not (optimizer or schedulers[0].optimizer):
                raise ScheduleError(
                    f"{name}: scheduler {index} belongs to another optimizer; "
                    "all must belong to the same."
                )

    def step(self, epoch: float | None = None) -> None:
        """Go on to the next epoch, after `optimizer.step()`."""
        if epoch is not None:
            raise ScheduleError(f"{type(self).__name__}.step takes no epoch.")
        groups = self.optimizer.param_groups
        before = [float(group["lr"]) for group in groups]
        self._ledger = ledger_of(self.optimizer, self._ledger)
        self._ledger.read(groups)
        self._step_parts()
        for index, group in enumerate(groups):
            if self._verbose and (index >= len(before) or before[index] != float(group["lr"])):
                report(self, index, group)

    def _step_parts(self) -> None:
        """Step the parts whose turn it is."""
        raise NotImplementedError

    def _update_lr(self, epoch: float | None = None) -> None:  # inside a SequentialLR
        if epoch is None:
            self.step()
        elif epoch == 0:
            self._initial_step()
        else:
            raise ScheduleError(f"{type(self).__name__} cannot jump to an epoch.")

    def get_lr(self) -> list[Rate]:
        return self.get_last_lr()

    # --- parts ---------------------------------------------------------------------------------

    def _act(self, part: Any, act: Callable[[], None], *, made: bool = False) -> None:
        """Let a part act; what one of torch's schedulers writes goes through the ledger too."""
        if isinstance(part, LRScheduler):
            act()
            return

        def written() -> list[Rate]:
            act()
            return [own(group["lr"]) for group in self.optimizer.param_groups]

        self._ledger.write(part, self._ledger.without_multipliers(written), made=made)

    def _initial_step(self) -> None:
        """Put the learning rates back to the initial ones and begin with the parts in turn.

        Where it is built, and where a SequentialLR around it gives it its turn.
        """
        groups, ledger = self.optimizer.param_groups, self._ledger
        ledger.based()
        ledger.overwrite()
        for multiplier in _multipliers(self):
            multiplier.counts = False
        ledger.write(self, [own(group["initial_lr"]) for group in groups], made=True)
        _forget(self._schedulers)
        for part in self._turn():
            self._act(part, part._initial_step, made=True)
        self._last_lr = [own(group["lr"]) for group in groups]

    def _turn(self) -> Sequence[Any]:
        """Return the parts whose turn it is."""
        return self._schedulers

    def _write_others(self) -> None:
        for part in self._turn():
            if isinstance(part, LRScheduler):
                part._write_others()

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every scheduler, under torch's keys."""
        return {
            **super().state_dict(),
            "_schedulers": [scheduler.state_dict() for scheduler in self._schedulers],
        }

    def _load(self, state_dict: dict[str, Any]) -> None:
        parts = state_dict["_schedulers"]
        if len(parts) != len(self._schedulers):
            raise ScheduleError(
                f"{type(self).__name__} has {len(self._schedulers)} schedulers, but the saved "
                f"state has {len(parts)}; nothing was changed."
            )
        super()._load(state_dict)
        for scheduler, part in zip(self._schedulers, parts, strict=True):
            load = scheduler._load if isinstance(scheduler, LRScheduler) else None
            (load or scheduler.load_state_dict)(part)
        _give_turn(self, True)


class SequentialLR(_Composed):
    """Schedulers one after the other, each from its own beginning; arguments are torch's."""

    _config: ClassVar[tuple[str, ...]] = ("_milestones",)

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: list[Any],
        milestones: list[int],
        last_epoch: int = -1,
        verbose: object = False,
    ) -> None:
        self._check(schedulers, optimizer)
        if len(milestones) != len(schedulers) - 1:
            raise ScheduleError(
                f"SequentialLR was given {len(schedulers)} schedulers and {len(milestones)} "
                "milestones; expected one milestone less than schedulers."
            )
        if list(milestones) != sorted(milestones):
            raise ScheduleError(f"SequentialLR: milestones={milestones!r} are not in order.")
        self._verbose = verbose is True
        attach(self, optimizer, 0)
        self._schedulers = schedulers
        self._milestones = list(milestones)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", own(group["lr"]))
        self._initial_step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a run that goes on is stepped without updates
            for _ in range(last_epoch + 1):
                self.step()

    def _index(self) -> int:
        return bisect_right(self._milestones, self.last_epoch)

    def _turn(self) -> Sequence[Any]:
        return [self._schedulers[self._index()]]

    def recursive_undo(self, sched: Any = None) -> None:
        """Return as torch's: take back the step that each scheduler made when it was made."""
        _forget([self if sched is None else sched])

    def _step_parts(self) -> None:
        self.last_epoch += 1
        index = self._index()
        scheduler = self._schedulers[index]
        try:
            if index > 0 and self._milestones[index - 1] == self.last_epoch:
                for multiplier in _multipliers(self):
                    self._ledger.leave(multiplier)
                self._act(scheduler, partial(update_lr, scheduler, 0))
            else:
                self._act(scheduler, scheduler.step)
        except BaseException:
            self.last_epoch -= 1
            raise
        self._last_lr = scheduler.get_last_lr()

    def _initial_step(self) -> None:
        self.last_epoch = 0
        super()._initial_step()

    def _planned(self) -> int | None:
        last = _planned(self._schedulers[-1])
        return None if last is None else ([0, *self._milestones][-1]) + last

    def at(self, step: int) -> list[float]:
        index = bisect_right(self._milestones, step)
        scheduler = self._schedulers[index]
        if index and isinstance(scheduler, MultiplicativeLR):
            return super().at(step)
        return [float(lr) for lr in scheduler.at(step - ([0, *self._milestones][index]))]


class ChainedScheduler(_Composed):
    """Schedulers side by side, all stepped at once; arguments are torch's."""

    def __init__(
        self,
        schedulers: Sequence[Any],
        optimizer: Optimizer | None = None,
        verbose: object = False,
    ) -> None:
        self._check(schedulers, optimizer)
        self._verbose = verbose is True
        attach(self, optimizer or schedulers[0].optimizer, 0)
        self._schedulers = schedulers
        self._last_lr = [own(group["lr"]) for group in self.optimizer.param_groups]

    def _step_parts(self) -> None:
        for scheduler in self._schedulers:
            self._act(scheduler, scheduler.step)
        self._last_lr = [own(group["lr"]) for group in self.optimizer.param_groups]

    def _planned(self) -> int | None:
        return max(filter(None, map(_planned, self._schedulers)), default=None)

    def at(self, step: int) -> list[float]:
        rates = [float(group["initial_lr"]) for group in self.optimizer.param_groups]
        bases = list(rates)
        for scheduler in self._schedulers:
            pure = isinstance(scheduler, (Curve, MultiplicativeLR))
            if not pure or getattr(scheduler, "eta_min", 0.0) != 0.0:
                return super().at(step)
            pairs = zip(rates, scheduler.at(step), bases, strict=True)
            rates = [rate * value / base if base else 0.0 for rate, value, base in pairs]
        return rates


def _planned(scheduler: Any) -> int | None:
    return scheduler._planned() if isinstance(scheduler, LRScheduler) else None


def _multipliers(scheduler: Any) -> list[Multiplier]:
    """Return the multipliers of a scheduler and of its parts."""
    if isinstance(scheduler, _Composed):
        return [each for part in scheduler._schedulers for each in _multipliers(part)]
    multiplier = getattr(scheduler, "_multiplier", None)
    return [] if multiplier is None else [multiplier]


def _give_turn(scheduler: Any, counts: bool) -> None:
    """Let the multipliers count of those parts whose turn it is."""
    if not isinstance(scheduler, _Composed):
        for multiplier in _multipliers(scheduler):
            multiplier.counts = counts
        return
    turn = scheduler._turn()
    for part in scheduler._schedulers:
        _give_turn(part, counts and any(part is each for each in turn))


def _forget(schedulers: Sequence[Any]) -> None:
    """Put schedulers back before their first step, however deep."""
    for scheduler in schedulers:
        if hasattr(scheduler, "_schedulers"):
            _forget(scheduler._schedulers)
        elif hasattr(scheduler, "last_epoch"):
            scheduler.last_epoch = -1
