"""Schedules: frozen values, pure functions of the step."""

from __future__ import annotations

from .base import Schedule
from .compose import Repeat, wsd
from .cycles import Cyclic, WarmRestarts
from .functions import SCHEDULES, FromFunction, register_schedule
from .jumps import MultiStep, Piecewise, StepDecay
from .one_cycle import OneCycle, OneCycleMomentum
from .shape import Shape
from .shapes import Constant, Cosine, Exponential, Linear, OneMinusSqrt, Polynomial
from .warm import InverseSqrt, Noam, Warmup

constant = Constant
cosine = Cosine
cyclic = Cyclic
exponential = Exponential
from_function = FromFunction
inverse_sqrt = InverseSqrt
linear = Linear
multi_step = MultiStep
noam = Noam
one_cycle = OneCycle
one_cycle_momentum = OneCycleMomentum
one_minus_sqrt = OneMinusSqrt
polynomial = Polynomial
repeat = Repeat
step_decay = StepDecay
piecewise = Piecewise
warm_restarts = WarmRestarts
warmup = Warmup

for _own in (
    *(constant, cosine, cyclic, exponential, inverse_sqrt, linear, multi_step, noam, one_cycle),
    *(
        one_cycle_momentum,
        one_minus_sqrt,
        polynomial,
        repeat,
        step_decay,
        piecewise,
        warm_restarts,
        warmup,
    ),
):
    register_schedule(_own.source_name, _own)
SCHEDULES["wsd"] = wsd

__all__ = [
    "SCHEDULES",
    "Schedule",
    "Shape",
    "constant",
    "cosine",
    "cyclic",
    "exponential",
    "from_function",
    "inverse_sqrt",
    "linear",
    "multi_step",
    "noam",
    "one_cycle",
    "one_cycle_momentum",
    "one_minus_sqrt",
    "piecewise",
    "polynomial",
    "register_schedule",
    "repeat",
    "step_decay",
    "warm_restarts",
    "warmup",
    "wsd",
]
