"""Schedules: frozen values, pure functions of the step."""

from __future__ import annotations

from collections.abc import Callable

from .base import Schedule
from .shapes import Constant, Cosine, Function, Linear, Steps, Warmup

constant = Constant
cosine = Cosine
function = Function
linear = Linear
steps = Steps
warmup = Warmup

#: constructors by the name under which plans call them
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "steps": steps,
    "warmup": warmup,
}

__all__ = ["SCHEDULES", "Schedule", "constant", "cosine", "function", "linear", "steps", "warmup"]
