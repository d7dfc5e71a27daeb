"""Reading torch's schedulers, and those of Transformers, back into schedules.

A reader says for one group what the scheduler gives it: its schedule, and the lr or momentum that
belong to it. What no schedule can express is an InexpressibleError, whose text names it.

Sources: `torch/optim/lr_scheduler.py`, version 2.13; `transformers/optimization.py`, version 5.23.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch.optim import lr_scheduler as torch_schedulers

from ..errors import PlanError, ScheduleError
from ..schedules import (
    Schedule,
    Shape,
    constant,
    cosine,
    cyclic,
    exponential,
    linear,
    multi_step,
    one_cycle,
    one_cycle_momentum,
    polynomial,
    step_decay,
    warm_restarts,
    warmup,
)
from ..schedules.base import phases_of
from ..schedules.duration import Run
from .from_lambda import InexpressibleError, read_function

Group = Mapping[str, Any]
Settings = dict[str, Any]
Reader = Callable[[Any, Group, int], Settings]


def read_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> list[Settings]:
    """Return for each group what a scheduler gives it: a schedule, and values that belong to it.

    A scheduler is read as it was made: from its first step on, whatever it has done since.

    Args:
        scheduler: a scheduler of the optimizer.
        optimizer: the optimizer, without wrappers.

    Returns:
        Settings for each group: "schedule" and "lr", and "momentum" or "betas" where they move.

    Raises:
        InexpressibleError: if no schedule can say the same.
        PlanError: if the scheduler belongs to another optimizer, or is none.
    """
    _check_owner(scheduler, optimizer)
    known = _reader(scheduler)
    bases = getattr(scheduler, "base_lrs", optimizer.param_groups)
    if len(bases) < len(optimizer.param_groups):
        raise InexpressibleError(
            f"the {_name(scheduler)}, which was made for {len(bases)} groups, while the optimizer "
            f"has {len(optimizer.param_groups)} by now"
        )
    found = []
    for index, group in enumerate(optimizer.param_groups):
        try:
            found.append({"lr": _base(group), **known(scheduler, group, index)})
        except InexpressibleError:
            raise
        except ScheduleError as error:  # a number that lamina's schedule of that kind refuses
            raise InexpressibleError(f"the {_name(scheduler)}: {error}") from error
    return found


def lr_now(settings: Settings, scheduler: Any) -> float | None:
    """Return the lr that the settings give at the step of the scheduler; None if it has none."""
    parts = getattr(scheduler, "_schedulers", [scheduler])
    step = getattr(scheduler, "last_epoch", getattr(parts[0], "last_epoch", None))
    if not isinstance(step, int) or step < 0:
        return None
    return float(settings["lr"]) * float(settings["schedule"](step))


def inner_optimizer(optimizer: Any) -> Any:
    """Return the optimizer that wrappers hold: Accelerate's, Lightning's, fastai's; or itself."""
    while True:
        held = getattr(optimizer, "__dict__", {})
        deeper = [held.get(key) for key in ("optimizer", "_optimizer", "opt")]
        inner = next((each for each in deeper if isinstance(each, torch.optim.Optimizer)), None)
        if inner is None:
            return optimizer
        optimizer = inner


def _check_owner(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    owner = getattr(scheduler, "optimizer", None)
    if owner is None:
        raise PlanError(
            f"scheduler={type(scheduler).__name__} object: expected a scheduler of the optimizer, "
            "such as one of torch.optim.lr_scheduler."
        )
    if inner_optimizer(owner) is not optimizer:
        raise PlanError(
            f"the {_name(scheduler)} belongs to another optimizer than the one given: pass the "
            "optimizer that it was made with."
        )


def _reader(scheduler: Any) -> Reader:
    kind = type(scheduler)
    known = _KNOWN.get(kind)
    if known is None and kind.__module__.startswith("lamina.optim.lr_scheduler"):
        known = _KNOWN.get(getattr(torch_schedulers, kind.__name__, object))
    if known is None:
        raise InexpressibleError(
            _UNKNOWN.get(_name(scheduler), _NO_SCHEDULE).format(_name(scheduler))
        )
    return known


def _name(scheduler: Any) -> str:
    return type(scheduler).__name__


def _base(group: Group) -> float:
    return float(group.get("initial_lr", group["lr"]))


_NO_SCHEDULE = "the {}, which has no schedule that is known to be the same"
_UNKNOWN = {
    "ReduceLROnPlateau": (
        "the {}, which does not know the name of its metric: add plateau('val_loss', ...) to the "
        "plan, with the name under which you report it"
    ),
    "SWALR": "the {}, which goes on from whatever the lr is when averaging begins",
}


# --- one formula -----------------------------------------------------------------------------


def _step(scheduler: Any, group: Group, index: int) -> Settings:
    return {"schedule": step_decay(every=scheduler.step_size, gamma=scheduler.gamma)}


def _multi_step(scheduler: Any, group: Group, index: int) -> Settings:
    milestones = sorted(scheduler.milestones.elements())
    return {"schedule": multi_step(milestones, gamma=scheduler.gamma)}


def _exponential(scheduler: Any, group: Group, index: int) -> Settings:
    return {"schedule": exponential(scheduler.gamma)}


def _constant(scheduler: Any, group: Group, index: int) -> Settings:
    _check_length(scheduler)
    first = constant(scheduler.factor, length=scheduler.total_iters)
    return {"schedule": first >> constant()}


def _linear(scheduler: Any, group: Group, index: int) -> Settings:
    begin, end, length = scheduler.start_factor, scheduler.end_factor, scheduler.total_iters
    _check_length(scheduler)
    # Both ways are factors with 1 at their higher end, which is scaled where that is not 1.
    if begin <= end:
        way: Schedule = warmup(length, begin / end if end else 1.0)
    else:
        way = linear(to=end / begin, length=length)
    top = max(begin, end)
    if top != 1:
        way = way * constant(top, length=length)
    return {"schedule": way >> constant(end)}


def _check_length(scheduler: Any) -> None:
    if scheduler.total_iters < 1:  # torch keeps the first factor for ever then
        raise InexpressibleError(f"the {_name(scheduler)} over {scheduler.total_iters} steps")


def _polynomial(scheduler: Any, group: Group, index: int) -> Settings:
    if scheduler.total_iters == 0 or scheduler.power == 0:  # torch leaves the lr alone then
        return {"schedule": constant()}
    shape = polynomial(scheduler.power, to=0.0, length=scheduler.total_iters)
    return {"schedule": shape >> constant(0.0)}


def _cosine(scheduler: Any, group: Group, index: int) -> Settings:
    return {"schedule": cosine(to=_floor(scheduler, group), length=scheduler.T_max)}


def _restarts(scheduler: Any, group: Group, index: int) -> Settings:
    floor = _floor(scheduler, group)
    return {"schedule": warm_restarts(first=scheduler.T_0, mult=scheduler.T_mult, to=floor)}


def _floor(scheduler: Any, group: Group) -> float:
    """Return the lowest lr as a share of the lr of a group."""
    lowest = float(scheduler.eta_min)
    if lowest and not _base(group):
        raise InexpressibleError(f"the {_name(scheduler)}, whose eta_min lifts a group from lr=0")
    return lowest / _base(group) if lowest else 0.0


def _function(scheduler: Any, group: Group, index: int) -> Settings:
    return {"schedule": read_function(scheduler.lr_lambdas[index])}


# --- with momentum ---------------------------------------------------------------------------


def _one_cycle(scheduler: Any, group: Group, index: int) -> Settings:
    phases, total = scheduler._schedule_phases, scheduler.total_steps
    turn = float(phases[0]["end_step"])
    if total < 2 or turn < 0:
        raise InexpressibleError(
            f"the OneCycleLR of {total} steps, which is too short for a way up"
        )
    shape: Settings = {
        # torch counts to the last step, a schedule to the first after it.
        "pct_start": turn / (total - 1),
        "anneal_strategy": scheduler._anneal_func_type,
        "three_phase": len(phases) == 3,
        "length": total - 1,
    }
    first, peak, last = (float(group[key]) for key in ("initial_lr", "max_lr", "min_lr"))
    course = one_cycle(div_factor=peak / first, final_div_factor=first / last, **shape)
    found: Settings = {"lr": peak, "schedule": course}
    if scheduler.cycle_momentum:
        low, high = float(group["base_momentum"]), float(group["max_momentum"])
        found |= _moving_momentum(group, one_cycle_momentum(low=low, high=high, **shape))
    return found


def _cyclic(scheduler: Any, group: Group, index: int) -> Settings:
    if getattr(scheduler, "_scale_fn_custom", None) is not None:
        raise InexpressibleError("the CyclicLR, whose scale_fn a plan cannot hold as text")
    size = scheduler.total_size
    up = _whole(size * scheduler.step_ratio)
    base, peak = float(scheduler.base_lrs[index]), float(scheduler.max_lrs[index])
    shape = {"up": up, "down": _whole(size - up), "mode": scheduler.mode, "gamma": scheduler.gamma}
    if not peak:
        raise InexpressibleError("the CyclicLR with max_lr=0")
    found: Settings = {"lr": peak, "schedule": cyclic(base=base / peak, **shape)}
    if scheduler.cycle_momentum:
        high, low = scheduler.max_momentums[index], scheduler.base_momentums[index]
        found |= _moving_momentum(group, cyclic(base=high, peak=low, **shape))
    return found


def _whole(number: float) -> int:
    """Return the whole number that torch keeps as a product of fractions."""
    if abs(number - round(number)) > 1e-6:
        raise InexpressibleError(f"the CyclicLR with {number:g} steps up or down")
    return round(number)


def _moving_momentum(group: Group, course: Schedule) -> Settings:
    if "betas" in group:
        return {"betas": (course, *group["betas"][1:])}
    return {"momentum": course}


# --- of several ------------------------------------------------------------------------------


def _sequence(scheduler: Any, group: Group, index: int) -> Settings:
    parts = [_factor(scheduler, part, group, index) for part in scheduler._schedulers]
    turns = [0, *scheduler._milestones]
    limited = [
        _limited(part, stop - begin)
        for part, (begin, stop) in zip(parts, pairwise(turns), strict=False)
    ]
    return {"schedule": reduce(operator.rshift, [*limited, parts[-1]])}


def _chain(scheduler: Any, group: Group, index: int) -> Settings:
    for part in scheduler._schedulers:
        name = _name(part)
        # torch's others write what they alone give, so that the last of them wins.
        if name not in _MULTIPLIES or getattr(part, "eta_min", None):
            raise InexpressibleError(f"the ChainedScheduler with {name}, which does not multiply")
    parts = [_factor(scheduler, part, group, index) for part in scheduler._schedulers]
    return {"schedule": reduce(operator.mul, parts)}


def _factor(whole: Any, part: Any, group: Group, index: int) -> Schedule:
    """Return the schedule of one part, if it is a factor on the lr that all parts share."""
    settings = _reader(part)(part, group, index)
    if set(settings) != {"schedule"}:
        raise InexpressibleError(
            f"the {_name(whole)} with {_name(part)}, which sets lrs of its own"
        )
    schedule: Schedule = settings["schedule"]
    return schedule


def _limited(schedule: Schedule, steps: int) -> Schedule:
    """Return a schedule that ends after some steps, if it can.

    What lasts for the rest of the run is given a length; phases that end with the part stay.
    """
    phases = list(phases_of(schedule))
    lengths = [phase.duration(Run()) for phase in phases]
    before = sum((length for length in lengths[:-1] if length is not None), Fraction(0))
    last, length = phases[-1], lengths[-1]
    if length is None and before == steps and phases[:-1]:
        return reduce(operator.rshift, phases[:-1])
    if length is None and before < steps and isinstance(last, Shape) and not last.needs_length:
        changed: dict[str, Any] = {"length": steps - int(before)}
        return reduce(operator.rshift, [*phases[:-1], replace(last, **changed)])
    if length is not None and before + length == steps:
        return schedule
    raise InexpressibleError(f"the SequentialLR, which cuts {schedule!r} after {steps} steps")


#: torch's schedulers that multiply the lr by something, whatever it is
_MULTIPLIES = {
    *("StepLR", "MultiStepLR", "ExponentialLR", "ConstantLR"),
    *("LinearLR", "PolynomialLR", "CosineAnnealingLR"),
}

_KNOWN: dict[type, Reader] = {
    torch_schedulers.StepLR: _step,
    torch_schedulers.MultiStepLR: _multi_step,
    torch_schedulers.ExponentialLR: _exponential,
    torch_schedulers.ConstantLR: _constant,
    torch_schedulers.LinearLR: _linear,
    torch_schedulers.PolynomialLR: _polynomial,
    torch_schedulers.CosineAnnealingLR: _cosine,
    torch_schedulers.CosineAnnealingWarmRestarts: _restarts,
    torch_schedulers.LambdaLR: _function,
    torch_schedulers.OneCycleLR: _one_cycle,
    torch_schedulers.CyclicLR: _cyclic,
    torch_schedulers.SequentialLR: _sequence,
    torch_schedulers.ChainedScheduler: _chain,
}
