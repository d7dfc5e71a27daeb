"""Reading the functions of Transformers' schedules, which are `LambdaLR` with a `partial`.

Source: `transformers/optimization.py`, version 5.23.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

from ..errors import ScheduleError
from ..schedules import (
    Schedule,
    constant,
    cosine,
    inverse_sqrt,
    linear,
    one_minus_sqrt,
    polynomial,
    warm_restarts,
    warmup,
)

Given = dict[str, Any]


class InexpressibleError(ScheduleError):
    """What a plan cannot say of an optimizer or scheduler; the text completes "it leaves out"."""


def read_function(function: Any) -> Schedule:
    """Return the schedule of a function of Transformers; raise InexpressibleError for others."""
    inner = function.func if isinstance(function, partial) else function
    given = dict(function.keywords) if isinstance(function, partial) else {}
    name = getattr(inner, "__name__", "")
    # A function of the same name from elsewhere may be another one.
    if getattr(inner, "__module__", "") != "transformers.optimization" or name not in _KNOWN:
        raise InexpressibleError(
            "the LambdaLR, whose function a plan cannot hold as text: use from_function"
        )
    schedule = _KNOWN[name](given)
    if schedule is None:
        raise InexpressibleError(f"the {name} with {given}")
    return schedule


def _after_warmup(given: Given, shape: Callable[[int], Schedule]) -> Schedule:
    steps = given["num_warmup_steps"]
    rest = shape(given["num_training_steps"] - steps)
    return warmup(steps) >> rest if steps else rest


def _constant(given: Given) -> Schedule:
    steps = given.get("num_warmup_steps", 0)
    return warmup(steps) >> constant() if steps else constant()


def _linear(given: Given) -> Schedule:
    return _after_warmup(given, lambda length: linear(to=0.0, length=length))


def _cosine(given: Given) -> Schedule | None:
    if given.get("num_cycles", 0.5) != 0.5:
        return None
    floor = given.get("min_lr_rate", 0.0)
    return _after_warmup(given, lambda length: cosine(to=floor, length=length))


def _restarts(given: Given) -> Schedule | None:
    cycles = given["num_cycles"]
    if not isinstance(cycles, int):
        return None
    return _after_warmup(
        given, lambda length: warm_restarts(cycles=cycles, length=length) >> constant(0.0)
    )


def _polynomial(given: Given) -> Schedule:
    floor = given["lr_end"] / given["lr_init"]
    power = given["power"]
    return _after_warmup(
        given, lambda length: polynomial(power, to=floor, length=length) >> constant(floor)
    )


def _inverse_sqrt(given: Given) -> Schedule:
    return inverse_sqrt(given["num_warmup_steps"], timescale=given["timescale"])


def _wsd(given: Given) -> Schedule | None:
    floor, decay = given["min_lr_ratio"], given["num_decay_steps"]
    ways: dict[str, Schedule] = {
        "linear": linear(to=floor, length=decay),
        "1-sqrt": one_minus_sqrt(to=floor, length=decay),
    }
    if given["num_cycles"] == 0.5:
        ways["cosine"] = cosine(to=floor, length=decay)
    way, rise = ways.get(given["decay_type"]), given["num_warmup_steps"]
    if way is None or (rise and given["warmup_type"] != "linear"):
        return None
    phases: list[Schedule] = [way, constant(floor)]
    if given["num_stable_steps"]:
        phases.insert(0, constant(length=given["num_stable_steps"]))
    if rise:
        phases.insert(0, warmup(rise, start=floor))
    return reduce(operator.rshift, phases)


_KNOWN: dict[str, Callable[[Given], Schedule | None]] = {
    "_get_constant_lambda": _constant,
    "_get_constant_schedule_with_warmup_lr_lambda": _constant,
    "_get_linear_schedule_with_warmup_lr_lambda": _linear,
    "_get_cosine_schedule_with_warmup_lr_lambda": _cosine,
    "_get_cosine_with_hard_restarts_schedule_with_warmup_lr_lambda": _restarts,
    "_get_polynomial_decay_schedule_with_warmup_lr_lambda": _polynomial,
    "_get_inverse_sqrt_schedule_lr_lambda": _inverse_sqrt,
    "_get_wsd_scheduler_lambda": _wsd,
}
