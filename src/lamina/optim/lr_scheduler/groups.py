"""What schedulers do to an optimizer when they are made, and what they warn of."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..._util.notices import warn
from .ledger import innermost, ledger_of


def attach(scheduler: Any, optimizer: Optimizer, last_epoch: int = -1) -> None:
    """Make an optimizer ready for a scheduler: its groups, its ledger, its count of steps.

    Args:
        scheduler: the one that is being made.
        optimizer: what it is for.
        last_epoch: -1 to begin; then a learning rate that was edited by hand is the initial one.

    Raises:
        TypeError: it is no optimizer.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{type(scheduler).__name__} was given {type(optimizer).__name__}; "
            "expected an optimizer."
        )
    scheduler.optimizer = optimizer
    _separate_tensors(optimizer)
    watch_steps(optimizer)
    ledger = scheduler._ledger = ledger_of(optimizer)
    # One of torch's schedulers on the same optimizer writes past the ledger, and what it wrote
    # cannot be told from an edit by hand.
    beside = hasattr(optimizer.step, "_wrapped_by_lr_sched")
    stepped = getattr(innermost(optimizer), "_opt_called", False)
    ledger.begin(
        optimizer.param_groups,
        rebase=last_epoch == -1 and not beside,
        beside=beside and not stepped,
    )


def _separate_tensors(optimizer: Optimizer) -> None:
    """Give groups that share one tensor as their learning rate tensors of their own."""
    seen: set[int] = set()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            if id(group["lr"]) in seen:
                group["lr"] = group["lr"].clone()
            seen.add(id(group["lr"]))


def watch_steps(optimizer: Optimizer) -> bool:
    """Have the optimizer note that it has stepped; return whether it did already have to.

    By torch's hook, and not by replacing `step` as torch's schedulers do: `step` may be anything
    callable by then, a compiled function or a partial one.
    """
    hooks = getattr(innermost(optimizer), "_optimizer_step_post_hooks", None)
    if hooks is None:
        return False
    if any(hook is note_step for hook in hooks.values()):
        return True
    innermost(optimizer).register_step_post_hook(note_step)
    return False


def note_step(optimizer: Any, args: object, kwargs: object) -> None:
    """Note that an optimizer has stepped, under the name that torch's schedulers use."""
    optimizer._opt_called = True


def keep_config(scheduler: Any, saved: dict[str, Any]) -> bool:
    """Take the constructor's arguments out of a saved state; warn if they differ."""
    changed = []
    for key in scheduler._config:
        if key in saved:
            old, now = saved.pop(key), getattr(scheduler, key)
            if old != now:
                changed.append(f"{key}={now!r} (saved: {old!r})")
    if changed:
        warn(
            f"{type(scheduler).__name__} keeps what its constructor was given: "
            f"{', '.join(changed)}. To go on with the saved arguments, construct it with them."
        )
    return bool(changed)


def warn_floor(scheduler: Any, floor: float, form: str) -> None:
    """Warn of an absolute floor that changes the ratios between groups, or raises one."""
    rates = [float(lr) for lr in scheduler.base_lrs]
    if floor > 0 and (len(set(rates)) > 1 or min(rates, default=floor) < floor):
        warn(
            f"{type(scheduler).__name__}: eta_min={floor:g} is absolute: every group ends there, "
            "so the ratios between groups are lost and a smaller lr goes up. In a plan floors are "
            f"relative: {form}."
        )


def warn_peak(scheduler: Any, peak: object, form: str) -> None:
    """Warn of one peak for groups whose own learning rates differ."""
    rates = {float(group["lr"]) for group in scheduler.optimizer.param_groups}
    if not isinstance(peak, (list, tuple)) and len(rates) > 1:
        warn(
            f"{type(scheduler).__name__}: max_lr={peak!r} is one peak for all groups, which "
            f"erases their own learning rates; pass a list, or in a plan {form}, whose peak is "
            "each group's own lr."
        )
