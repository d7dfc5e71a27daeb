"""Which optimizers a plan may name, and what it may know of them: one table for both tiers."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import HyperparameterError, PlanError, did_you_mean
from ..model.suggestions import unknown_setting
from .base import Algorithm, Method
from .trial import REQUIRED, arguments, first_argument, required, signature_of, takes_any, trial_of

#: optimizer classes by the name under which plans write them
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {}

#: arguments of torch's constructors that choose an implementation, not an update
_IMPLEMENTATION = ("foreach", "capturable", "differentiable", "fused")


def register_optimizer(name: str, optimizer: type) -> None:
    """Let plans (and TOML) name an optimizer class.

    Args:
        name: the name plans will write.
        optimizer: a subclass of `torch.optim.Optimizer`.

    Raises:
        PlanError: for anything else, or for a name that is taken.
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise PlanError(f"{optimizer!r} is not a subclass of torch.optim.Optimizer.")
    if OPTIMIZERS.get(name, optimizer) is not optimizer:
        raise PlanError(f"the optimizer name {name!r} is taken by {OPTIMIZERS[name]!r}.")
    OPTIMIZERS[name] = optimizer


_PASS_THE_CLASS = " Any subclass of torch.optim.Optimizer can be passed itself, without a name."


def optimizer_class(given: Any) -> type[torch.optim.Optimizer]:
    """Return the optimizer class that a plan names."""
    if isinstance(given, str):
        if given not in OPTIMIZERS:
            short = given.rpartition(".")[2]
            near = [name for name in OPTIMIZERS if name.lower() == short.lower()]
            hint = f" Did you mean {near[0]!r}?" if near else did_you_mean(given, OPTIMIZERS)
            raise PlanError(
                f"the optimizer {given!r} is not registered; registered are "
                f"{', '.join(OPTIMIZERS)}.{hint or _PASS_THE_CLASS}"
            )
        return OPTIMIZERS[given]
    if isinstance(given, type) and issubclass(given, torch.optim.Optimizer):
        return given
    if isinstance(given, torch.optim.Optimizer):
        raise PlanError(_instance(given))
    if isinstance(given, type):
        what = f"the class {given.__name__}, which is no torch.optim.Optimizer"
    else:
        what = f"an object of type {type(given).__name__}; pass the class, not an instance"
    raise PlanError(f"the plan's optimizer is {what}: expected a class such as lamina.AdamW.")


def _instance(given: torch.optim.Optimizer) -> str:
    name = type(given).__name__
    lr = given.param_groups[0].get("lr") if given.param_groups else None
    setting = f", lr={float(lr):g}" if isinstance(lr, (int, float)) else ""
    return (
        f"the plan's optimizer is an instance of {name}, which holds parameters of its own: "
        f"expected a class such as lamina.AdamW. Pass the class with its settings: "
        f"Plan({name}{setting})."
    )


def optimizer_name(optimizer: type) -> str:
    """Return the name under which a plan prints an optimizer class."""
    return next(
        (name for name, known in OPTIMIZERS.items() if known is optimizer), optimizer.__name__
    )


def algorithm_of(optimizer: type) -> Algorithm | None:
    """Return the rule of one of lamina's own optimizers; None for a guest, and for LBFGS."""
    method = method_of(optimizer)
    return method if isinstance(method, Algorithm) else None


def method_of(optimizer: type) -> Method | None:
    """Return the method of one of lamina's own optimizers, LBFGS too; None for a guest.

    A class derived from one of them is a guest: its `step` or its defaults may be its own.
    """
    method = vars(optimizer).get("algorithm")
    return method if isinstance(method, Method) else None


def is_whole_vector(optimizer: type) -> bool:
    """Return whether a method needs all parameters at once, as L-BFGS does."""
    method = method_of(optimizer)
    return method is not None and method.unit == "vector"


def hyperparameters(optimizer: type) -> dict[str, Any]:
    """Return the hyperparameters of an optimizer class with its defaults; lr first."""
    method = method_of(optimizer)
    if method is not None:
        return dict(method.defaults)
    refuse_unlike(optimizer)
    known = _settings(optimizer)
    shown = [key for key in known if key not in _IMPLEMENTATION and _is_shown(key, known[key])]
    shown.sort(key=lambda key: key != "lr")
    return {key: None if known[key] is REQUIRED else known[key] for key in shown}


def _is_shown(key: str, value: Any) -> bool:
    """Return whether a plan knows a default: lists, functions and None are left to the class."""
    return key == "lr" or value is REQUIRED or (value is not None and _is_plain(value))


def refuse_unlike(optimizer: type) -> None:
    """Raise `PlanError` for a class that cannot be built over parameter groups, with the reason."""
    trial, name = trial_of(optimizer), optimizer_name(optimizer)
    first, needed = first_argument(optimizer), required(optimizer)[0]
    inner = next((key for key in (first, *sorted(needed)) if "optimizer" in key), "")
    if trial.wraps or (trial.made is None and inner):
        raise PlanError(
            f"the optimizer {name} wraps another one (its {trial.wraps or inner}), whose state and "
            "values a plan could not reach: give the plan the class of the inner optimizer, or use "
            f"{name} without a plan."
        )
    if trial.made is None and first in _FIRST:
        raise PlanError(
            f"the optimizer {name} takes {first} first, {_FIRST[first]}, where a plan makes the "
            "groups: use it without a plan."
        )


#: what some take in the place of parameter groups, and why
_FIRST = {
    "named_parameters": "to make groups of its own by their names",
    "named_params": "to make groups of its own by their names",
    "model": "to make groups of its own from the whole model",
}


def _settings(optimizer: type) -> dict[str, Any]:
    """Return the arguments of a constructor, with values from a trial build."""
    trial, given = trial_of(optimizer), arguments(optimizer)
    own = signature_of(optimizer)
    if trial.made is not None:  # what a base takes may be given by the class: its groups tell
        keys = [key for key in given if key in own or key in trial.made or key in trial.needed]
        # What is worked out where None is given may depend on the parameters: left to the class.
        made = {
            key for key in keys if key in trial.made and (given[key] is not None or key == "lr")
        }
        return {key: trial.made[key] if key in made else given[key] for key in keys}
    # Its groups are not known: numbers stay as they are written, others may stand for something.
    return {key: value for key, value in own.items() if value is REQUIRED or _is_number(value)}


def _is_number(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return all(isinstance(part, (bool, int, float)) for part in parts)


def _is_plain(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return all(part is None or isinstance(part, str) or _is_number(part) for part in parts)


def settings_of(optimizer: type) -> frozenset[str]:
    """Return the names of all arguments of a guest's constructor."""
    return frozenset(arguments(optimizer))


def options(optimizer: type) -> tuple[str, ...]:
    """Return the hyperparameters that choose a variant of the update, one for the whole run."""
    method = method_of(optimizer)
    if method is not None:
        return (*method.options, *_OWN)
    known = hyperparameters(optimizer).items()
    return tuple(key for key, value in known if isinstance(value, (bool, str)))


def counts(optimizer: type) -> tuple[str, ...]:
    """Return the hyperparameters that are whole numbers."""
    method = method_of(optimizer)
    return () if method is None else method.counts


def known_hyperparameter(optimizer: type, key: str, where: str, value: Any = None) -> None:
    """Raise `HyperparameterError` if the optimizer does not have this hyperparameter.

    `value` is what was given for it, to say how it is written.
    """
    if key in _SETTINGS:
        raise HyperparameterError(f"{where}, which is a setting of the plan, not a hyperparameter.")
    if key == "differentiable":
        raise HyperparameterError(
            f"{where}, which a plan does not have: its steps are not recorded by autograd. To "
            "differentiate through steps, use an optimizer without a plan: "
            "lamina.optim.AdamW(params, differentiable=True)."
        )
    if key == "rounding" and algorithm_of(optimizer) is None and not _may_have(optimizer, key):
        raise HyperparameterError(
            f"{where}, but its optimizer {optimizer_name(optimizer)} has no hyperparameter "
            "'rounding': LBFGS and third-party optimizers round 16-bit weights in their own way. "
            "Leave it out here, or keep these parameters in float32."
        )
    known = hyperparameters(optimizer)
    own = _OWN if algorithm_of(optimizer) is not None else ()
    if key not in (*known, *own) and not _may_have(optimizer, key):
        known = {**known, **(_settings(optimizer) if method_of(optimizer) is None else {})}
        name = optimizer_name(optimizer)
        raise HyperparameterError(
            f"{where}, but its optimizer {name} has no hyperparameter {key!r}; it has "
            f"{', '.join([*known, *own])}.{unknown_setting(key, value, [*known, *own])}"
        )


def _may_have(optimizer: type, key: str) -> bool:
    """Return whether a guest may have a setting that is no argument of its constructor.

    Its groups have it, or its step looks for it there; what could not be tried is judged at build.
    """
    if method_of(optimizer) is not None or key in ("params", "name", "differentiable"):
        return False
    trial = trial_of(optimizer)
    known = {*_settings(optimizer), *(trial.made or ()), *(trial.read or ())}
    untried = trial.made is None or (trial.read is None and takes_any(optimizer))
    return key in known or untried


def check_hyperparameters(optimizer: type, values: dict[str, Any], where: str) -> None:
    """Raise `HyperparameterError` if a value is out of the optimizer's range, or missing."""
    method = method_of(optimizer)
    if method is None:
        for key, default in _settings(optimizer).items():
            needed = default is REQUIRED or key == "lr"  # some work out another lr from None
            if needed and key in values and values[key] is None:
                name = optimizer_name(optimizer)
                raise HyperparameterError(
                    f"{where}: the optimizer {name} has no default for {key}; give it: {key}=..."
                )
        return
    try:
        method.check({key: value for key, value in values.items() if key not in _OWN})
    except HyperparameterError as error:
        raise HyperparameterError(f"{where}: {error}") from error


#: what lamina's own optimizers take beside the hyperparameters of their rules
_OWN = ("state_dtype", "rounding")
_SETTINGS = ("schedule", "frozen", "thaw", "freeze", "rewarm", "clip_norm", "optimizer")
