"""Reading the groups of an existing optimizer back into a plan, with the shortest patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .._util.notices import warn
from ..algorithms.registry import OPTIMIZERS, hyperparameters, method_of, optimizer_name
from ..algorithms.trial import trial_of
from ..errors import PlanError
from ..model.parameters import Owned, ParamInfo, collect
from .cover import Cover, Names
from .from_lambda import InexpressibleError
from .from_scheduler import inner_optimizer, lr_now, read_scheduler

Settings = dict[str, Any]
#: what groups hold beside hyperparameters: how a step is computed, and notes of others
_NOTES = {
    *("params", "name", "param_names", "foreach", "fused", "capturable", "differentiable"),
    *("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"),  # torch's schedulers
}
_MISSING = object()


def read_optimizer(
    model: nn.Module,
    optimizer: Any,
    scheduler: Any,
    make_plan: Callable[..., Any],
    make_rule: Callable[..., Any],
) -> Any:
    """Return the plan that gives each parameter of a model what the groups give it.

    Args:
        model: the model whose parameters the optimizer updates.
        optimizer: an optimizer with parameter groups, or a wrapper that holds one.
        scheduler: a scheduler of it, of a known kind; None for constant learning rates.
        make_plan: the class Plan.
        make_rule: the class Rule.

    Raises:
        PlanError: if the optimizer updates what is no parameter of the model, is none, or carries
            out a plan already; or if the scheduler belongs to another.
    """
    optimizer, scheduler = _checked(optimizer, make_plan), _unwrapped_scheduler(scheduler)
    kind = _class_of(optimizer)
    owned = collect(model)
    infos = {item.info.name: item.info for item in owned}
    groups, problems = _settings_of_groups(kind, optimizer, scheduler)
    settings, twice = _by_name(owned, optimizer, groups)
    if twice:
        problems.append(f"the second update in each step of {_listed(twice)}, given twice")
    trained = frozenset(settings)
    cover = Cover(infos, free=frozenset(infos) - trained)
    plan, rules = _common_and_rules(settings, cover)
    changed = {key for _, values in rules for key in values}
    defaults = hyperparameters(kind)
    plan = {
        k: v for k, v in plan.items() if k in ("lr", *changed) or not _is_default(defaults, k, v)
    }
    resting = frozenset(n for n, info in infos.items() if n not in trained and info.requires_grad)
    if resting:
        selecting = Cover(infos, free=_frozen(infos)).patterns(resting)
        rules += [(match, {"frozen": True}) for match in selecting]
    if problems:
        warn(f"the plan read from {optimizer_name(kind)} leaves out {'; '.join(problems)}.")
    made = [make_rule(match, **values) for match, values in rules]
    return make_plan(kind, rules=made, **plan)


# --- what was given --------------------------------------------------------------------------


def _checked(optimizer: Any, make_plan: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside of wrappers, if a plan can be read from it."""
    inner = inner_optimizer(optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise PlanError(
            f"expected an optimizer with parameter groups, not {type(optimizer).__name__}."
        )
    if isinstance(getattr(inner, "plan", None), make_plan):
        raise PlanError("the optimizer carries out a plan already: take its optimizer.plan.")
    return inner


def _unwrapped_scheduler(scheduler: Any) -> Any:
    """Return the scheduler inside of Accelerate's wrapper."""
    inner = getattr(scheduler, "__dict__", {}).get("scheduler")
    return scheduler if inner is None else inner


def _class_of(optimizer: torch.optim.Optimizer) -> type[torch.optim.Optimizer]:
    """Return the class for a plan: lamina's own in the place of torch's of the same name."""
    kind = type(optimizer)
    own = OPTIMIZERS.get(kind.__name__)
    is_torchs = getattr(torch.optim, kind.__name__, None) is kind
    return own if own is not None and is_torchs else kind


# --- the settings of each group --------------------------------------------------------------


def _settings_of_groups(
    kind: type[torch.optim.Optimizer], optimizer: torch.optim.Optimizer, scheduler: Any
) -> tuple[list[Settings], list[str]]:
    """Return the settings of each group, and what they leave out."""
    problems: list[str] = []
    found = [_hyperparameters(kind, optimizer, group) for group in optimizer.param_groups]
    unread = sorted({key for each in found for key in each if each[key] is _MISSING})
    if unread:
        problems.append(f"{', '.join(unread)}, which it keeps where they cannot be read")
    found = [{k: v for k, v in each.items() if v is not _MISSING} for each in found]
    strange = {key for g in optimizer.param_groups for key in g} - _NOTES - _read(kind)
    if "lr_scale" in strange:
        problems += _scale_rates(found, optimizer, scheduler)
        strange.remove("lr_scale")
    if strange:
        problems.append(f"{', '.join(sorted(strange))} in its groups, which its step does not read")
    problems += _schedule_rates(found, optimizer, scheduler)
    return found, problems


def _hyperparameters(
    kind: type[torch.optim.Optimizer], optimizer: torch.optim.Optimizer, group: Mapping[str, Any]
) -> Settings:
    """Return the hyperparameters of a group; those that a class keeps in itself are for all."""
    found: Settings = {}
    own = method_of(kind) is not None
    made = {"state_dtype": None, "rounding": None} if own else trial_of(kind).made or {}
    for key in sorted(_read(kind) - _NOTES, key=lambda key: key != "lr"):
        value = group.get(key, getattr(optimizer, key, _MISSING))
        if key not in group and (callable(value) or key not in hyperparameters(kind)):
            value = _MISSING
        found[key] = _plain(value)
    shown = hyperparameters(kind)
    return {
        key: value
        for key, value in found.items()
        if key in shown or (value is not _MISSING and not _is_default(made, key, value))
    }


def _read(kind: type[torch.optim.Optimizer]) -> set[str]:
    """Return the keys of groups that a class knows, or reads in a step."""
    known = set(hyperparameters(kind))
    if method_of(kind) is not None:
        return known | {"state_dtype", "rounding"}
    trial = trial_of(kind)
    return known | {*(trial.made or ()), *(trial.read or ())}


def _scale_rates(
    found: list[Settings], optimizer: torch.optim.Optimizer, scheduler: Any
) -> list[str]:
    """Multiply rates by timm's `lr_scale`, which its schedulers read and its optimizers do not."""
    if type(scheduler).__module__.startswith("timm."):
        for settings, group in zip(found, optimizer.param_groups, strict=True):
            settings["lr"] = float(group.get("initial_lr", group["lr"])) * group.get(
                "lr_scale", 1.0
            )
        return []
    return [
        "lr_scale in its groups, which no step reads: timm's schedulers multiply the lr by it, so "
        "give the plan the scheduler too"
    ]


def _schedule_rates(
    found: list[Settings], optimizer: torch.optim.Optimizer, scheduler: Any
) -> list[str]:
    """Add the schedule to the settings of each group; return what could not be."""
    groups = optimizer.param_groups
    if scheduler is None:
        moved = [g for g in groups if _plain(g["lr"]) != _plain(g.get("initial_lr", g["lr"]))]
        return ["the scheduler that has moved its lr, and was not given"] if moved else []
    try:
        read = read_scheduler(scheduler, optimizer)
    except InexpressibleError as error:
        for settings, group in zip(found, groups, strict=True):
            if "lr_scale" not in group:
                settings["lr"] = _plain(group.get("initial_lr", group["lr"]))
        return [f"the schedule: {error}"]
    by_hand = []
    for settings, course, group in zip(found, read, groups, strict=True):
        now = lr_now(course, scheduler)
        if now is not None and abs(now - float(group["lr"])) > 1e-6 * max(now, 1e-12):
            by_hand.append(f"lr={float(group['lr']):g} instead of {now:g}")
        settings |= course
    if by_hand:
        return [f"what its groups hold beside the schedule now: {', '.join(by_hand[:3])}"]
    return []


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta:
        return value.item()
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value


# --- the settings of each parameter ----------------------------------------------------------


def _by_name(
    owned: Iterable[Owned], optimizer: torch.optim.Optimizer, settings: list[Settings]
) -> tuple[dict[str, Settings], list[str]]:
    """Return the settings of each parameter by its name, and the names that come twice."""
    names = {id(item.tensor): item.info.name for item in owned}
    found: dict[str, Settings] = {}
    twice: list[str] = []
    strange = 0
    for group, its in zip(optimizer.param_groups, settings, strict=True):
        for param in group["params"]:
            name = names.get(id(param))
            if name is None:
                strange += 1
            elif name in found:  # torch takes the same tensor twice with a warning
                twice.append(name)
            else:
                found[name] = its
    if strange:
        raise PlanError(
            f"the optimizer updates {strange} tensors that are no parameters of this model. Give "
            "the model that it was built for; if parts of it were replaced since (a new head), "
            "build the optimizer again first."
        )
    if not found:
        raise PlanError("the optimizer has no parameter of this model.")
    return found, twice


def _common_and_rules(
    settings: Mapping[str, Settings], cover: Cover
) -> tuple[Settings, list[tuple[str, Settings]]]:
    """Return the commonest value of each setting, and rules for the parameters with others."""
    plan: Settings = {}
    rules: dict[str, Settings] = {}
    for key in dict.fromkeys(key for each in settings.values() for key in each):
        by_value = _by_value({name: each[key] for name, each in settings.items() if key in each})
        plan[key] = common = max(by_value, key=lambda value: len(by_value[value]))
        for value, names in by_value.items():
            if value != common:
                for pattern in cover.patterns(names):
                    rules.setdefault(pattern, {})[key] = value
    return plan, list(rules.items())


def _by_value(values: Mapping[str, Any]) -> dict[Any, Names]:
    found: dict[Any, set[str]] = {}
    for name, value in values.items():
        try:
            found.setdefault(value, set()).add(name)
        except TypeError as error:
            raise PlanError(
                f"the group of {name!r} holds a {type(value).__name__} among its settings, which "
                "a plan cannot hold as text."
            ) from error
    return {value: frozenset(names) for value, names in found.items()}


def _is_default(defaults: Mapping[str, Any], key: str, value: Any) -> bool:
    default = defaults.get(key, _MISSING)
    return default is not _MISSING and type(default) is not object and _plain(default) == value


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _frozen(infos: Mapping[str, ParamInfo]) -> Names:
    return frozenset(name for name, info in infos.items() if not info.requires_grad)
