"""What may change a run while it goes: overrides, reports, modes of guests, freezing by hand."""

from __future__ import annotations

import logging
from abc import abstractmethod

import torch

from ..guests.guests import Guests
from ..optim.engine import Engine
from ..plan.history import extended
from ..resolve.resolved import Resolved
from ..resolve.timeline import Feedback
from ..runtime.exchange import Exchange
from ..runtime.freezing import Freezer
from ..runtime.monitor import Monitor
from ..runtime.overrides import check_chosen, select_groups
from ..runtime.reports import changes, check_report, from_rank_zero, observe_all

log = logging.getLogger("lamina")


class Steerable(Engine):
    """An optimizer under a plan whose values can be changed the sanctioned way."""

    _resolved: Resolved
    _freezer: Freezer
    _guests: Guests
    _exchange: Exchange
    _monitor: Monitor

    @property
    def clock(self) -> int:
        """How many steps were taken; the step that comes next, counted from 0."""
        return int(self.param_groups[0]["clock"])

    @property
    def active(self) -> dict[str, bool]:
        """Whether each group trains in the next step, by name."""
        names = (group["name"] for group in self.param_groups)
        return dict(zip(names, map(bool, self._freezer.active), strict=True))

    @property
    def _feedback(self) -> Feedback:
        changed = {g["name"]: g["overrides"] for g in self.param_groups if g["overrides"]}
        return Feedback(changed, self.param_groups[0]["feedback"])

    def _follow_model(self) -> bool:
        """Adopt the parameters that FSDP2 has put into the model, with the state of the old ones.

        Returns:
            Whether there were any.
        """
        adopted = self._exchange.adopt(self.param_groups)
        self._follow_exchanged()
        return adopted

    @abstractmethod
    def _publish(self, clock: int) -> None:
        """Write the values of step `clock` into the groups."""

    def override(self, *, rule: str | None = None, **hyper: float | None) -> None:
        """Replace what the plan gives for hyperparameters, from the next step on.

        As a last rule would: the schedule still multiplies lr. Saved with the state and logged.

        Args:
            rule: the name of a group, or a pattern that covers whole groups; all by default.
            **hyper: numbers; None takes an override back.

        Raises:
            PlanError: for an unknown group or hyperparameter; nothing was changed.
        """
        self._follow_model()
        chosen = select_groups(self._resolved, rule)
        check_chosen(self._resolved, chosen, hyper, self.clock)
        for index in chosen:
            group = self.param_groups[index]
            before = group["overrides"][-1][1] if group["overrides"] else {}
            kept = {k: v for k, v in {**before, **hyper}.items() if v is not None}
            group["overrides"] = extended(group["overrides"], self.clock, kept)
            log.info("step %d: override of %r: %s", self.clock, group["name"], hyper)
        self._publish(self.clock)

    def report(self, **metrics: float) -> None:
        """Feed metrics to plateaus, early stopping and thaws that wait for one.

        Call it on every process; the numbers of rank 0 count. Values change for the next step,
        windows at the end of the next step; `should_stop` says when to stop.

        Args:
            **metrics: names as in the plan, and numbers, such as `val_loss=0.31`.

        Raises:
            PlanError: for a NaN, or if the plan watches none of these; nothing was changed.
        """
        self._follow_model()
        numbers = check_report(self._resolved, from_rank_zero(metrics))
        seen = self.param_groups[0]["feedback"]
        new = observe_all(self._resolved, seen, numbers, self.clock)
        for group in self.param_groups:  # a new dict: saved states must not move with it
            group["feedback"] = new
        for line in changes(seen, new):
            log.info("step %d: %s", self.clock, line)
        self._publish(self.clock)
        self._monitor.reported(self.clock)

    @property
    def should_stop(self) -> bool:
        """Whether early stopping has asked to stop."""
        return any(seen.get("stop") for seen in self.param_groups[0]["feedback"].values())

    def train(self) -> None:
        """Put guests that have modes (schedule-free optimizers) into training mode.

        What the plan froze stays as it is.
        """
        self._set_mode("train")

    def eval(self) -> None:
        """Put guests that have modes (schedule-free optimizers) into evaluation mode.

        What the plan froze stays as it is.
        """
        self._set_mode("eval")

    def _set_mode(self, mode: str) -> None:
        self._guests.set_mode(mode, [name for name, trains in self.active.items() if trains])

    def _is_due(self, param: torch.Tensor) -> bool:
        # Frozen by hand since the build: left alone, as what the plan itself did not freeze.
        self._freezer.set_aside(param)
        return False
