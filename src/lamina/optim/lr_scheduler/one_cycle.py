"""OneCycleLR."""

from __future__ import annotations

from typing import Any, ClassVar

from torch.optim import Optimizer

from ..._util.numbers import is_whole
from ...errors import ScheduleError
from .cycles import Cycled, PerGroup, anneal, per_group
from .groups import attach, warn_peak
from .ledger import Group

Phase = dict[str, Any]


class OneCycleLR(Cycled):
    """Up to `max_lr` and far down again, once; arguments and defaults are torch's.

    Past `total_steps` the last value is held.
    """

    _config: ClassVar[tuple[str, ...]] = (
        *("total_steps", "_schedule_phases", "_anneal_func_type", "cycle_momentum"),
    )
    _hidden: ClassVar[tuple[str, ...]] = (*Cycled._hidden, "_div_factor", "_final_div_factor")

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: PerGroup,
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        cycle_momentum: bool = True,
        base_momentum: PerGroup = 0.85,
        max_momentum: PerGroup = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
        verbose: object = False,
    ) -> None:
        attach(self, optimizer, last_epoch)
        self.total_steps = _total(total_steps, epochs, steps_per_epoch)
        if not isinstance(pct_start, (int, float)) or not 0 <= pct_start <= 1:
            raise ScheduleError(f"OneCycleLR was given pct_start={pct_start!r}; expected 0 to 1.")
        if anneal_strategy not in ("cos", "linear"):
            raise ScheduleError(
                f"OneCycleLR was given anneal_strategy={anneal_strategy!r}; "
                "expected 'cos' or 'linear'."
            )
        self._schedule_phases = _phases(self.total_steps, float(pct_start), three_phase)
        self._anneal_func_type = anneal_strategy
        self._div_factor, self._final_div_factor = div_factor, final_div_factor
        if last_epoch == -1:
            warn_peak(self, max_lr, "schedule=lamina.one_cycle()")
        peaks = per_group(self, "max_lr", max_lr)
        if last_epoch == -1:
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                self._range(group, peak)
        self.cycle_momentum = cycle_momentum
        if cycle_momentum:
            self._begin_momentum(base_momentum, max_momentum, last_epoch)
        super().__init__(optimizer, last_epoch, verbose)

    def _range(self, group: Group, peak: float) -> None:
        group["initial_lr"] = peak / self._div_factor
        group["max_lr"] = peak
        group["min_lr"] = group["initial_lr"] / self._final_div_factor

    def _join(self, index: int, group: Group) -> None:
        if "min_lr" not in group:
            peak = self.optimizer.param_groups[0]["max_lr"]
            self._range(group, group.get("max_lr", peak * self._scale(index, peak)))
        self._follow_first_momentum(group)

    def _value(self, group: Group, step: float, kind: str) -> float:
        start = 0.0
        step = min(step, self.total_steps - 1)
        for phase in self._schedule_phases:  # the last one ends at the last step
            if step <= float(phase["end_step"]):
                break
            start = float(phase["end_step"])
        span = float(phase["end_step"]) - start
        share = (step - start) / span if span else 1.0
        levels = group[phase[f"start_{kind}"]], group[phase[f"end_{kind}"]]
        return anneal(*levels, share, self._anneal_func_type)

    def at(self, step: int) -> list[float]:
        return [self._value(group, step, "lr") for group in self.optimizer.param_groups]

    def _momentum(self, index: int, step: float) -> float:
        return self._value(self.optimizer.param_groups[index], step, "momentum")

    def _planned(self) -> int | None:
        return self.total_steps


def _total(total_steps: int | None, epochs: int | None, steps_per_epoch: int | None) -> int:
    if total_steps is None and (epochs is None or steps_per_epoch is None):
        raise ScheduleError("OneCycleLR needs total_steps, or epochs and steps_per_epoch.")
    given = {"total_steps": total_steps}
    if total_steps is None:
        given = {"epochs": epochs, "steps_per_epoch": steps_per_epoch}
    total = 1
    for name, number in given.items():
        if not is_whole(number) or number < 1:
            raise ScheduleError(
                f"OneCycleLR was given {name}={number!r}; expected a whole number above 0."
            )
        total *= number
    return total


def _phases(total: int, pct_start: float, three_phase: bool) -> list[Phase]:
    """Return where each phase ends and between which values it goes, under torch's keys."""
    levels = [
        (pct_start * total - 1, "initial_lr", "max_lr", "max_momentum", "base_momentum"),
        (total - 1, "max_lr", "min_lr", "base_momentum", "max_momentum"),
    ]
    if three_phase:
        levels[1:] = [
            (2 * pct_start * total - 2, "max_lr", "initial_lr", "base_momentum", "max_momentum"),
            (total - 1, "initial_lr", "min_lr", "max_momentum", "max_momentum"),
        ]
    keys = ("end_step", "start_lr", "end_lr", "start_momentum", "end_momentum")
    return [dict(zip(keys, level, strict=True)) for level in levels]
