"""What schedulers do to the groups of an optimizer: prepare, write, remember, report."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ...errors import LaminaWarning

log = logging.getLogger("lamina")

Rate = float | Tensor
Group = dict[str, Any]

#: what schedulers last wrote into the groups of an optimizer: (the group, its lr)
_WRITTEN: WeakKeyDictionary[Optimizer, list[tuple[Group, float]]] = WeakKeyDictionary()


def own(lr: Rate) -> Rate:
    """A copy of a learning rate that shares no memory with it."""
    return lr.clone() if isinstance(lr, Tensor) else lr


def prepare(scheduler: object, optimizer: Optimizer, last_epoch: int = -1) -> None:
    """Make the groups of an optimizer ready: no shared tensors, no stale initial lr."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{type(scheduler).__name__} was given {type(optimizer).__name__}; "
            "expected an optimizer."
        )
    seen: set[int] = set()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            if id(group["lr"]) in seen:  # one tensor as the default of two groups
                group["lr"] = group["lr"].clone()
            seen.add(id(group["lr"]))
    if last_epoch != -1:
        return
    for group, written in _WRITTEN.get(optimizer, ()):
        current = any(group is one for one in optimizer.param_groups)
        if current and float(group["lr"]) != written:  # the user set it since: begin from there
            group["initial_lr"] = own(group["lr"])


def write(scheduler: Any, values: Sequence[Rate]) -> None:
    """Write the learning rates into the groups, in place where they are tensors."""
    groups = scheduler.optimizer.param_groups
    for index, (group, lr) in enumerate(zip(groups, values, strict=True)):
        if isinstance(lr, np.generic):
            lr = float(lr)  # a NumPy number would make checkpoints unloadable
        old = own(group["lr"])
        if isinstance(group["lr"], Tensor):
            with torch.no_grad():
                group["lr"].fill_(float(lr))
        else:
            group["lr"] = lr
        if scheduler._verbose and float(old) != float(group["lr"]):
            report(scheduler, index, group)
    remember(scheduler)


def remember(scheduler: Any) -> None:
    """Keep what the groups hold now, for `get_last_lr` and the next scheduler."""
    groups = scheduler.optimizer.param_groups
    scheduler._last_lr = [own(group["lr"]) for group in groups]
    _WRITTEN[scheduler.optimizer] = [(group, float(group["lr"])) for group in groups]


def report(scheduler: Any, index: int, group: Group) -> None:
    """One line for a changed learning rate."""
    log.info(
        "%s: group %d (%s): lr %.6g",
        type(scheduler).__name__,
        index,
        group.get("name", "unnamed"),
        float(group["lr"]),
    )


def keep_config(scheduler: Any, saved: dict[str, Any]) -> bool:
    """Take the constructor's arguments out of a saved state; warn if they differ."""
    changed = []
    for key in scheduler._config:
        if key in saved:
            old, now = saved.pop(key), getattr(scheduler, key)
            if old != now:
                changed.append(f"{key}={now!r} (saved: {old!r})")
    if changed:
        warnings.warn(
            f"{type(scheduler).__name__} keeps what its constructor was given: "
            f"{', '.join(changed)}. To go on with the saved arguments, construct it with them.",
            LaminaWarning,
            stacklevel=4,
        )
    return bool(changed)


def warn_floor(scheduler: Any, floor: float, form: str) -> None:
    """Warn of an absolute floor that changes the ratios between groups, or raises one."""
    rates = [float(lr) for lr in scheduler.base_lrs]
    if floor > 0 and (len(set(rates)) > 1 or min(rates, default=floor) < floor):
        warnings.warn(
            f"{type(scheduler).__name__}: eta_min={floor:g} is absolute: every group ends there, "
            "so the ratios between groups are lost and a smaller lr goes up. In a plan floors are "
            f"relative: {form}.",
            LaminaWarning,
            stacklevel=3,
        )


def warn_peak(scheduler: Any, peak: object, form: str) -> None:
    """Warn of one peak for groups whose own learning rates differ."""
    rates = {float(group["lr"]) for group in scheduler.optimizer.param_groups}
    if not isinstance(peak, (list, tuple)) and len(rates) > 1:
        warnings.warn(
            f"{type(scheduler).__name__}: max_lr={peak!r} is one peak for all groups, which "
            f"erases their own learning rates; pass a list, or in a plan {form}, whose peak is "
            "each group's own lr.",
            LaminaWarning,
            stacklevel=3,
        )
