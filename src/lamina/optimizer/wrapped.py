"""The verbs of an optimizer under a plan, for code that holds only a trainer's wrapper of it."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from ..errors import PlanError
from ..optim.engine import Engine
from .optimizer import Optimizer

_Kind = TypeVar("_Kind")


def unwrap(optimizer: Any) -> Optimizer:
    """Return the optimizer under a plan that a wrapper holds.

    Accelerate, Lightning and Fabric wrap optimizers; each keeps the original as `.optimizer`. Some
    of these wrappers delegate nothing but torch's own methods.

    Args:
        optimizer: an optimizer built by `Plan.build`, or any wrapper of one, however deep.

    Returns:
        The optimizer itself.

    Raises:
        PlanError: if there is no optimizer under a plan inside.

    Example:
        >>> import torch, lamina as lm
        >>> optimizer = lm.Plan(lm.SGD, lr=0.1).build(torch.nn.Linear(2, 1))
        >>> unwrap(optimizer) is optimizer
        True
    """
    return _unwrap_to(optimizer, Optimizer, "an optimizer built by Plan.build")


def _unwrap_to(optimizer: Any, kind: type[_Kind], expected: str) -> _Kind:
    inner, seen = optimizer, set[int]()
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        # Lightning's wrapper derives from the class of what it wraps, so ask for what is inside.
        held = getattr(inner, "__dict__", {})
        deeper = held.get("optimizer", held.get("_optimizer"))
        if deeper is None and isinstance(inner, kind):
            return inner
        inner = deeper
    raise PlanError(
        f"an object of type {type(optimizer).__name__} was given; expected {expected}, "
        "or a wrapper that keeps one as .optimizer."
    )


def report(optimizer: Any, /, **metrics: float) -> None:
    """Feed metrics to a plan's plateaus, early stopping and thaws; see `Optimizer.report`.

    Args:
        optimizer: the optimizer, or a trainer's wrapper of it.
        **metrics: names as in the plan, and numbers.

    Raises:
        PlanError: if there is no optimizer under a plan inside, for a NaN, or if the plan watches
            none of these metrics; nothing was changed.

    Example:
        >>> import torch, lamina as lm
        >>> plan = lm.Plan(lm.SGD, lr=0.1, feedback=lm.plateau("val_loss"))
        >>> optimizer = plan.build(torch.nn.Linear(2, 1))
        >>> report(optimizer, val_loss=0.31)
    """
    unwrap(optimizer).report(**metrics)


def override(optimizer: Any, /, *, rule: str | None = None, **hyper: float | None) -> None:
    """Replace hyperparameters from the next step on; see `Optimizer.override`.

    Args:
        optimizer: the optimizer, or a trainer's wrapper of it.
        rule: the name of a group, or a pattern that covers whole groups; all by default.
        **hyper: numbers; None takes an override back.

    Raises:
        PlanError: if there is no optimizer under a plan inside, or for an unknown group or
            hyperparameter; nothing was changed.

    Example:
        >>> import torch, lamina as lm
        >>> optimizer = lm.Plan(lm.SGD, lr=0.1).build(torch.nn.Linear(2, 1))
        >>> override(optimizer, lr=0.05)
        >>> optimizer.param_groups[0]["lr"]
        0.05
    """
    unwrap(optimizer).override(rule=rule, **hyper)


def restart_state(optimizer: Any, /, *which: str | torch.Tensor) -> None:
    """Begin the state of some parameters anew, in their size of now; see `Engine.restart_state`.

    Args:
        optimizer: an optimizer of lamina, with or without a plan, or a trainer's wrapper of it.
        *which: patterns over the names of parameters (a name is one), or the tensors.

    Raises:
        PlanError: if there is no optimizer of lamina inside, or for a pattern or a tensor that is
            no parameter there; nothing was changed.

    Example:
        >>> import torch, lamina as lm
        >>> model = torch.nn.Embedding(10, 2)
        >>> optimizer = lm.Plan(lm.AdamW, lr=1e-3).build(model)
        >>> model.weight.data = torch.cat([model.weight.data, torch.zeros(5, 2)])
        >>> restart_state(optimizer, "weight")
    """
    _unwrap_to(optimizer, Engine, "an optimizer of lamina").restart_state(*which)


def should_stop(optimizer: Any, /) -> bool:
    """Return whether early stopping has asked to stop; see `Optimizer.should_stop`.

    Args:
        optimizer: the optimizer, or a trainer's wrapper of it.

    Raises:
        PlanError: if there is no optimizer under a plan inside.

    Example:
        >>> import torch, lamina as lm
        >>> should_stop(lm.Plan(lm.SGD, lr=0.1).build(torch.nn.Linear(2, 1)))
        False
    """
    return unwrap(optimizer).should_stop
