"""One plan for how every parameter of a PyTorch model trains.

    import lamina as lm

    plan = lm.Plan("AdamW", lr=1e-3, schedule=lm.warmup("5%") >> lm.cosine(),
                   rules=[lm.Rule("encoder.*", lr=1e-4, thaw="1 epoch")])
    print(plan.preview(model, epochs=3, steps_per_epoch=len(loader)))
    optimizer = plan.build(model, epochs=3, steps_per_epoch=len(loader))

The public names, by purpose; `help(lamina.NAME)` explains one of them.

Plans
    Plan, Rule                  what is wanted: an optimizer, settings, rules for parts of a model
    by_depth, times, top_down   values for rules: decay by depth, factors, thawing from the top down
    plateau, early_stop, on_plateau         reactions to reported metrics
    recipes, starter_plan, StarterPlan      well-known plans; a first plan for a model
    find_lr, FoundLR            a learning-rate range test

Looking before training
    Preview, diff, PlanDiff     the run as a table, picture and data; two plans compared
    Explanation, Finding        why a value is what it is; what is probably not meant
    resolve_plan, Resolved, values_at, Feedback         every value at every step, as data
    reuse                       computes what is frozen once per example
    check, watch, Seen          mistakes in any training loop, with or without a plan

Schedules
    constant, linear, cosine, polynomial, exponential, inverse_sqrt, one_minus_sqrt, noam
    step_decay, multi_step, piecewise, warmup, warm_restarts, cyclic, repeat, wsd
    one_cycle, one_cycle_momentum
    from_function, register_schedule, Schedule, Shape   schedules of one's own

Gradients
    clip_norm, clip_value, clip_param_norm, agc, scale_gradients        operations for rules
    clip_grad_norm_, clip_grad_value_                   functions, as in torch.nn.utils

Optimizers
    Optimizer                   what Plan.build returns: a torch.optim.Optimizer
    SGD, RMSprop, Adam, AdamW, LBFGS, LARS, LAMB, LayerAdaptiveAdam, Muon
    register_optimizer          an optimizer of one's own
    optim                       the same classes and lr_scheduler, without a plan
    report, override, should_stop, restart_state, unwrap    for optimizers inside a wrapper

Models
    freeze, thaw, trainable, Trainable      freezing by hand
    tie, untie, ties, Tie       weight sharing
    ParamInfo                   what rules know of a parameter

Saved state
    checkpoint                  files that verify themselves
    load_distributed, read_distributed      folders of torch.distributed.checkpoint
    LoadReport                  what a load did

Errors
    LaminaError, LaminaWarning  the base of all errors; warnings
    PlanError, PatternError, HyperparameterError, ScheduleError, TimeUnitError
    StateError, MismatchError, NonFiniteError, OwnershipError, FrozenMovedError
    MissingExtraError, TaskError

Imported by name: lamina.integrations (Transformers, Lightning, Accelerate) and lamina.training
(what `lamina run` does).
"""

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
from .resolve.resolve import resolve_plan
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

__version__ = "0.2.0"

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
    "resolve_plan",
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


def __dir__() -> list[str]:
    """List the public names, for `dir`, `help` and completion."""
    return sorted([*__all__, "__all__", "__doc__", "__version__"])
