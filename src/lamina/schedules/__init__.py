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

# Registering a class also names it, in what it prints and in its errors.
_OWN: dict[str, type[Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "cyclic": cyclic,
    "exponential": exponential,
    "inverse_sqrt": inverse_sqrt,
    "linear": linear,
    "multi_step": multi_step,
    "noam": noam,
    "one_cycle": one_cycle,
    "one_cycle_momentum": one_cycle_momentum,
    "one_minus_sqrt": one_minus_sqrt,
    "piecewise": piecewise,
    "polynomial": polynomial,
    "repeat": repeat,
    "step_decay": step_decay,
    "warm_restarts": warm_restarts,
    "warmup": warmup,
}
for _name, _class in _OWN.items():
    register_schedule(_name, _class)
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
