"""lamina: one plan for how every parameter of a PyTorch model trains."""

from __future__ import annotations

from . import optim
from .errors import (
    HyperparameterError,
    LaminaError,
    MissingExtraError,
    NonFiniteError,
    OwnershipError,
    PatternError,
    PlanError,
    ScheduleError,
    StateError,
    TaskError,
    TimeUnitError,
)
from .explain import Explanation
from .feedback import early_stop, on_plateau, plateau
from .gradients.operations import agc, clip_norm, clip_param_norm, clip_value, scale
from .optim import SGD, Adam, AdamW, RMSprop, register_optimizer
from .optimizer import Optimizer
from .parameters import ParamInfo
from .plan import Plan, Rule
from .preview import Preview
from .resolve import resolve
from .resolved import Finding, Resolved
from .schedules import Schedule, constant, cosine, function, linear, steps, warmup
from .settings import by_depth, times, top_down
from .timeline import Feedback, values_at

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Explanation",
    "Feedback",
    "Finding",
    "HyperparameterError",
    "LaminaError",
    "MissingExtraError",
    "NonFiniteError",
    "Optimizer",
    "OwnershipError",
    "ParamInfo",
    "PatternError",
    "Plan",
    "PlanError",
    "Preview",
    "RMSprop",
    "Resolved",
    "Rule",
    "Schedule",
    "ScheduleError",
    "StateError",
    "TaskError",
    "TimeUnitError",
    "agc",
    "by_depth",
    "clip_norm",
    "clip_param_norm",
    "clip_value",
    "constant",
    "cosine",
    "early_stop",
    "function",
    "linear",
    "on_plateau",
    "optim",
    "plateau",
    "register_optimizer",
    "resolve",
    "scale",
    "steps",
    "times",
    "top_down",
    "values_at",
    "warmup",
]
