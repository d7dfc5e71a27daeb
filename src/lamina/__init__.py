"""lamina: one plan for how every parameter of a PyTorch model trains."""

from __future__ import annotations

# isort: off
from ._util import startup as _startup  # before anything that takes time  # noqa: F401

# isort: on
from . import checkpoint, optim, recipes
from .checkpoint.distributed import load_distributed, read_distributed
from .errors import (
    FrozenMovedError,
    HyperparameterError,
    LaminaError,
    LaminaWarning,
    MismatchError,
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
from .gradients.clip import clip_grad_norm_, clip_grad_value_
from .gradients.operations import agc, clip_norm, clip_param_norm, clip_value, scale_gradients
from .model.finding import Finding
from .model.freeze import Trainable, freeze, thaw, trainable
from .model.parameters import ParamInfo
from .model.ties import Tie, tie, ties, untie
from .optim import (
    LAMB,
    LARS,
    LBFGS,
    SGD,
    Adam,
    AdamW,
    LayerAdaptiveAdam,
    Muon,
    RMSprop,
    register_optimizer,
)
from .optimizer.optimizer import Optimizer
from .optimizer.wrapped import override, report, restart_state, should_stop, unwrap
from .plan.operators import by_depth, times, top_down
from .plan.plan import Plan, Rule
from .plan.reactions import early_stop, on_plateau, plateau
from .preview import PlanDiff, Preview, diff
from .range_test import FoundLR, find_lr
from .resolve.explain import Explanation
from .resolve.resolve import resolve
from .resolve.resolved import Resolved
from .resolve.timeline import Feedback, values_at
from .reuse import reuse
from .schedules import (
    Schedule,
    Shape,
    constant,
    cosine,
    cyclic,
    exponential,
    from_function,
    inverse_sqrt,
    linear,
    multi_step,
    noam,
    one_cycle,
    one_cycle_momentum,
    one_minus_sqrt,
    piecewise,
    polynomial,
    register_schedule,
    repeat,
    step_decay,
    warm_restarts,
    warmup,
    wsd,
)
from .starter import StarterPlan, starter_plan
from .state.report import LoadReport
from .watch.session import Seen, watch
from .watch.static import check

__version__ = "0.1.0"

__all__ = [
    "LAMB",
    "LARS",
    "LBFGS",
    "SGD",
    "Adam",
    "AdamW",
    "Explanation",
    "Feedback",
    "Finding",
    "FoundLR",
    "FrozenMovedError",
    "HyperparameterError",
    "LaminaError",
    "LaminaWarning",
    "LayerAdaptiveAdam",
    "LoadReport",
    "MismatchError",
    "MissingExtraError",
    "Muon",
    "NonFiniteError",
    "Optimizer",
    "OwnershipError",
    "ParamInfo",
    "PatternError",
    "Plan",
    "PlanDiff",
    "PlanError",
    "Preview",
    "RMSprop",
    "Resolved",
    "Rule",
    "Schedule",
    "ScheduleError",
    "Seen",
    "Shape",
    "StarterPlan",
    "StateError",
    "TaskError",
    "Tie",
    "TimeUnitError",
    "Trainable",
    "agc",
    "by_depth",
    "check",
    "checkpoint",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_norm",
    "clip_param_norm",
    "clip_value",
    "constant",
    "cosine",
    "cyclic",
    "diff",
    "early_stop",
    "exponential",
    "find_lr",
    "freeze",
    "from_function",
    "inverse_sqrt",
    "linear",
    "load_distributed",
    "multi_step",
    "noam",
    "on_plateau",
    "one_cycle",
    "one_cycle_momentum",
    "one_minus_sqrt",
    "optim",
    "override",
    "piecewise",
    "plateau",
    "polynomial",
    "read_distributed",
    "recipes",
    "register_optimizer",
    "register_schedule",
    "repeat",
    "report",
    "resolve",
    "restart_state",
    "reuse",
    "scale_gradients",
    "should_stop",
    "starter_plan",
    "step_decay",
    "thaw",
    "tie",
    "ties",
    "times",
    "top_down",
    "trainable",
    "untie",
    "unwrap",
    "values_at",
    "warm_restarts",
    "warmup",
    "watch",
    "wsd",
]
