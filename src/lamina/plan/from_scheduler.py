"""Reading torch's schedulers, and those of Transformers, back into schedules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import lr_scheduler as torch_schedulers

from ..schedules import (
    Schedule,
    constant,
    cosine,
    exponential,
    linear,
    multi_step,
    polynomial,
    step_decay,
    warmup,
)


def read_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> tuple[Schedule | None, str]:
    """Return the schedule that a scheduler stands for, and what it could not express, or "".

    A scheduler is read as it was made: from its first step on, whatever it has done since.
    """
    known = _KNOWN.get(type(scheduler))
    if known is None:
        name = type(scheduler).__name__
        return None, f"the {name}, which has no schedule that is known to be the same"
    rates = {float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups}
    return known(scheduler, rates)


Read = tuple[Schedule | None, str]


def _step(scheduler: Any, rates: set[float]) -> Read:
    return step_decay(every=scheduler.step_size, gamma=scheduler.gamma), ""


def _multi_step(scheduler: Any, rates: set[float]) -> Read:
    milestones = sorted(scheduler.milestones.elements())
    return multi_step(milestones, gamma=scheduler.gamma), ""


def _exponential(scheduler: Any, rates: set[float]) -> Read:
    return exponential(scheduler.gamma), ""


def _constant(scheduler: Any, rates: set[float]) -> Read:
    return constant(scheduler.factor, length=scheduler.total_iters) >> constant(), ""


def _linear(scheduler: Any, rates: set[float]) -> Read:
    begin, end, length = scheduler.start_factor, scheduler.end_factor, scheduler.total_iters
    if end == 1:
        return warmup(length, begin) >> constant(), ""
    if begin == 1:
        return linear(to=end, length=length) >> constant(end), ""
    return None, f"the LinearLR from {begin:g} to {end:g}, neither of which is 1"


def _polynomial(scheduler: Any, rates: set[float]) -> Read:
    shape = polynomial(scheduler.power, to=0.0, length=scheduler.total_iters)
    return shape >> constant(0.0), ""


def _cosine(scheduler: Any, rates: set[float]) -> Read:
    if scheduler.eta_min and len(rates) > 1:
        return None, (
            "the CosineAnnealingLR, whose eta_min is one number for groups of different rates: "
            "write cosine(to=share of the lr)"
        )
    share = scheduler.eta_min / rates.pop() if scheduler.eta_min else 0.0
    return cosine(to=share, length=scheduler.T_max), ""


def _function(scheduler: Any, rates: set[float]) -> Read:
    """Read a LambdaLR whose function is one of Transformers' (a `partial` with its lengths)."""
    functions = scheduler.lr_lambdas
    first = functions[0]
    same = all(_parts(each) == _parts(first) for each in functions)
    name, given = _parts(first)
    if not same or name not in _OF_TRANSFORMERS:
        return None, "the LambdaLR, whose function a plan cannot hold as text: use from_function"
    schedule = _OF_TRANSFORMERS[name](given)
    return (schedule, "") if schedule else (None, f"the {name} with {given}")


def _parts(function: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(function, partial):
        return getattr(function, "__name__", ""), {"is": id(function)}
    return function.func.__name__, dict(function.keywords)


def _after_warmup(given: dict[str, Any], shape: Callable[[int], Schedule]) -> Schedule:
    steps = given["num_warmup_steps"]
    rest = shape(given["num_training_steps"] - steps)
    return warmup(steps) >> rest if steps else rest


def _hf_linear(given: dict[str, Any]) -> Schedule:
    return _after_warmup(given, lambda length: linear(to=0.0, length=length))


def _hf_cosine(given: dict[str, Any]) -> Schedule | None:
    if given.get("num_cycles", 0.5) != 0.5:
        return None
    return _after_warmup(given, lambda length: cosine(to=0.0, length=length))


def _hf_constant(given: dict[str, Any]) -> Schedule:
    steps = given["num_warmup_steps"]
    return warmup(steps) >> constant() if steps else constant()


_OF_TRANSFORMERS: dict[str, Callable[[dict[str, Any]], Schedule | None]] = {
    "_get_linear_schedule_with_warmup_lr_lambda": _hf_linear,
    "_get_cosine_schedule_with_warmup_lr_lambda": _hf_cosine,
    "_get_constant_schedule_with_warmup_lr_lambda": _hf_constant,
}

_KNOWN: dict[type, Callable[[Any, set[float]], Read]] = {
    torch_schedulers.StepLR: _step,
    torch_schedulers.MultiStepLR: _multi_step,
    torch_schedulers.ExponentialLR: _exponential,
    torch_schedulers.ConstantLR: _constant,
    torch_schedulers.LinearLR: _linear,
    torch_schedulers.PolynomialLR: _polynomial,
    torch_schedulers.CosineAnnealingLR: _cosine,
    torch_schedulers.LambdaLR: _function,
}
