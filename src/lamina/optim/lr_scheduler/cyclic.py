"""CyclicLR."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch.optim import Optimizer

from ...errors import ScheduleError
from .base import state_of
from .cycles import Cycled, PerGroup, per_group
from .groups import attach, warn_peak
from .ledger import Group, Rate, as_held


class CyclicLR(Cycled):
    """Straight lines between `base_lr` and `max_lr`; arguments and defaults are torch's."""

    _config: ClassVar[tuple[str, ...]] = (
        *("max_lrs", "total_size", "step_ratio", "mode", "gamma", "scale_mode"),
        *("cycle_momentum", "base_momentums", "max_momentums"),
    )
    _hidden: ClassVar[tuple[str, ...]] = (*Cycled._hidden, "_scale_fn_custom")

    def __init__(
        self,
        optimizer: Optimizer,
        base_lr: PerGroup,
        max_lr: PerGroup,
        step_size_up: int = 2000,
        step_size_down: int | None = None,
        mode: str = "triangular",
        gamma: float = 1.0,
        scale_fn: Callable[[float], float] | None = None,
        scale_mode: str = "cycle",
        cycle_momentum: bool = True,
        base_momentum: PerGroup = 0.8,
        max_momentum: PerGroup = 0.9,
        last_epoch: int = -1,
        verbose: object = False,
    ) -> None:
        attach(self, optimizer, last_epoch)
        up = float(step_size_up)
        down = up if step_size_down is None else float(step_size_down)
        if not (up > 0 and down > 0):
            raise ScheduleError(
                f"CyclicLR was given step_size_up={step_size_up!r} and "
                f"step_size_down={step_size_down!r}; expected numbers above 0."
            )
        if scale_fn is None and mode not in ("triangular", "triangular2", "exp_range"):
            raise ScheduleError(
                f"CyclicLR was given mode={mode!r}; expected 'triangular', 'triangular2' or "
                "'exp_range', or a scale_fn."
            )
        if last_epoch == -1:
            warn_peak(self, max_lr, "schedule=lamina.cyclic(up=..., base=0.25)")
        bases = per_group(self, "base_lr", base_lr)
        self.max_lrs = per_group(self, "max_lr", max_lr)
        if last_epoch == -1:
            self._ledger.overwrite()
            self._ledger.write(self, bases, made=True)
        self.total_size = up + down
        self.step_ratio = up / self.total_size
        self.mode, self.gamma = mode, gamma
        self._scale_fn_custom = scale_fn
        own_mode = "iterations" if mode == "exp_range" else "cycle"
        self.scale_mode = scale_mode if scale_fn is not None else own_mode
        self.cycle_momentum = cycle_momentum
        if cycle_momentum:
            self._begin_momentum(base_momentum, max_momentum, last_epoch)
            self.base_momentums = per_group(self, "base_momentum", base_momentum)
            self.max_momentums = per_group(self, "max_momentum", max_momentum)
        super().__init__(optimizer, last_epoch, verbose)
        self.base_lrs: list[Rate] = list(bases)

    def _join(self, index: int, group: Group) -> None:
        if index < len(self.max_lrs):
            return
        # As far between its base and its peak as the first group is, or else at its peak.
        base, peak = float(self.base_lrs[0]), self.max_lrs[0]
        scale = self._scale(index, peak)
        group["initial_lr"] = as_held(group["lr"], base * scale)
        self.max_lrs.append(peak * scale)
        self._follow_first_momentum(group)
        if self.cycle_momentum:
            self.base_momentums.append(float(group["base_momentum"]))
            self.max_momentums.append(float(group["max_momentum"]))

    def scale_fn(self, x: float) -> float:
        """Return how high a cycle (counted from 1) or an iteration goes."""
        if self._scale_fn_custom is not None:
            return float(self._scale_fn_custom(x))
        if self.mode == "triangular2":
            return float(1 / 2.0 ** (x - 1))
        return 1.0 if self.mode == "triangular" else float(self.gamma**x)

    def _height(self, step: float) -> float:
        cycle = math.floor(1 + step / self.total_size)
        place = 1.0 + step / self.total_size - cycle
        up = self.step_ratio
        triangle = place / up if place <= up else (place - 1) / (up - 1)
        return triangle * self.scale_fn(cycle if self.scale_mode == "cycle" else step)

    def at(self, step: int) -> list[float]:
        height = self._height(step)
        pairs = zip(self.base_lrs, self.max_lrs, strict=True)
        return [float(base) + (peak - float(base)) * height for base, peak in pairs]

    def _momentum(self, index: int, step: float) -> float:
        low, high = self.base_momentums[index], self.max_momentums[index]
        return high - (high - low) * self._height(step)

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the optimizer; a `scale_fn` only if it is a callable object."""
        return {**super().state_dict(), "_scale_fn_custom": state_of(self._scale_fn_custom)}

    def _load(self, state_dict: dict[str, Any]) -> None:
        super()._load(state_dict)
        attributes = state_dict.get("_scale_fn_custom")
        if attributes and self._scale_fn_custom is not None:
            vars(self._scale_fn_custom).update(attributes)
