"""Schedules: frozen values, pure functions of the step."""

from __future__ import annotations

from .base import Schedule
from .compose import Repeat, wsd
from .cycles import Cyclic, WarmRestarts
from .functions import SCHEDULES, Function, register_schedule
from .jumps import MultiSteps, Steps, Table
from .one_cycle import OneCycle, OneCycleMomentum
from .shape import Shape
from .shapes import Constant, Cosine, Exponential, Linear, OneMinusSqrt, Polynomial
from .warm import InverseSqrt, Noam, Warmup

constant = Constant
cosine = Cosine
cyclic = Cyclic
exponential = Exponential
function = Function
inverse_sqrt = InverseSqrt
linear = Linear
multi_steps = MultiSteps
noam = Noam
one_cycle = OneCycle
one_cycle_momentum = OneCycleMomentum
one_minus_sqrt = OneMinusSqrt
polynomial = Polynomial
repeat = Repeat
steps = Steps
table = Table
warm_restarts = WarmRestarts
warmup = Warmup

for _own in (
    *(constant, cosine, cyclic, exponential, inverse_sqrt, linear, multi_steps, noam, one_cycle),
    *(one_cycle_momentum, one_minus_sqrt, polynomial, repeat, steps, table, warm_restarts, warmup),
):
    register_schedule(_own.spelling, _own)
SCHEDULES["wsd"] = wsd

__all__ = [
    "SCHEDULES",
    "Schedule",
    "Shape",
    "constant",
    "cosine",
    "cyclic",
    "exponential",
    "function",
    "inverse_sqrt",
    "linear",
    "multi_steps",
    "noam",
    "one_cycle",
    "one_cycle_momentum",
    "one_minus_sqrt",
    "polynomial",
    "register_schedule",
    "repeat",
    "steps",
    "table",
    "warm_restarts",
    "warmup",
    "wsd",
]
