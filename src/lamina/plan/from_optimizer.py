"""Reading the groups of an existing optimizer back into a plan, with the shortest patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .._util.notices import warn
from ..algorithms.registry import OPTIMIZERS, hyperparameters, optimizer_name
from ..errors import PlanError
from ..model.parameters import Owned, ParamInfo, collect
from ..model.patterns import compile_pattern
from .from_scheduler import read_scheduler

Names = frozenset[str]
#: settings of groups that say how a step is computed, not what it gives
_HOW = {"foreach", "fused", "capturable", "differentiable"}


def read_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    make_plan: Callable[..., Any],
    make_rule: Callable[..., Any],
) -> Any:
    """Return the plan that gives each parameter of a model what the groups give it.

    Args:
        model: the model whose parameters the optimizer updates.
        optimizer: an optimizer with parameter groups.
        scheduler: a scheduler of it, of a known kind; None for constant learning rates.
        make_plan: the class Plan.
        make_rule: the class Rule.

    Raises:
        PlanError: if the optimizer updates what is no parameter of the model, or is no optimizer.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise PlanError(
            f"expected an optimizer with parameter groups, not {type(optimizer).__name__}."
        )
    kind = _class_of(optimizer)
    owned = collect(model)
    infos = {item.info.name: item.info for item in owned}
    groups = _groups_by_name(owned, optimizer)
    trained = frozenset(groups)
    settings = {name: _settings(kind, groups[name], scheduler is not None) for name in groups}
    keys = dict.fromkeys(key for each in settings.values() for key in each)
    cover = Cover(infos, free=frozenset(infos) - trained)
    plan: dict[str, Any] = {}
    rules: dict[str, dict[str, Any]] = {}
    for key in keys:
        by_value = _by_value({name: settings[name][key] for name in groups})
        common = max(by_value, key=lambda value: len(by_value[value]))
        plan[key] = common
        for value, names in by_value.items():
            if value != common:
                rules.setdefault(cover.pattern(names), {})[key] = value
    defaults = hyperparameters(kind)
    plan = {k: v for k, v in plan.items() if k == "lr" or k in _changed(rules) or v != defaults[k]}
    resting = frozenset(n for n, info in infos.items() if n not in trained and info.requires_grad)
    if resting:
        rules[Cover(infos, free=_frozen(infos)).pattern(resting)] = {"frozen": True}
    if scheduler is not None:
        schedule, problem = read_scheduler(scheduler, optimizer)
        if problem:
            name = optimizer_name(kind)
            warn(f"the plan read from {name} has no schedule; it leaves out {problem}.")
        else:
            plan["schedule"] = schedule
    made = [make_rule(match, **values) for match, values in rules.items()]
    return make_plan(kind, rules=made, **plan)


def _class_of(optimizer: torch.optim.Optimizer) -> type[torch.optim.Optimizer]:
    """Return the class for a plan: lamina's own in the place of torch's of the same name."""
    kind = type(optimizer)
    own = OPTIMIZERS.get(kind.__name__)
    return own if own is not None and kind.__module__.startswith("torch.optim") else kind


def _groups_by_name(
    owned: Iterable[Owned], optimizer: torch.optim.Optimizer
) -> dict[str, Mapping[str, Any]]:
    names = {id(item.tensor): item.info.name for item in owned}
    found: dict[str, Mapping[str, Any]] = {}
    strange = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            name = names.get(id(param))
            if name is None:
                strange += 1
            elif name not in found:  # torch takes the same tensor twice with a warning
                found[name] = group
    if strange:
        raise PlanError(
            f"the optimizer updates {strange} tensors that are no parameters of this model. Give "
            "the model that it was built for; if parts of it were replaced since (a new head), "
            "build the optimizer again first."
        )
    if not found:
        raise PlanError("the optimizer has no parameter of this model.")
    return found


def _settings(
    kind: type[torch.optim.Optimizer], group: Mapping[str, Any], scheduled: bool
) -> dict[str, Any]:
    """Return the hyperparameters of a group; of a scheduled lr its value before the schedule."""
    known = hyperparameters(kind)
    found = {key: group[key] for key in known if key in group and key not in _HOW}
    if scheduled and "initial_lr" in group:
        found["lr"] = group["initial_lr"]
    return {key: _plain(value) for key, value in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value


def _by_value(values: Mapping[str, Any]) -> dict[Any, Names]:
    found: dict[Any, set[str]] = {}
    for name, value in values.items():
        found.setdefault(value, set()).add(name)
    return {value: frozenset(names) for value, names in found.items()}


def _changed(rules: Mapping[str, Mapping[str, Any]]) -> set[str]:
    return {key for values in rules.values() for key in values}


def _frozen(infos: Mapping[str, ParamInfo]) -> Names:
    return frozenset(name for name, info in infos.items() if not info.requires_grad)


class Cover:
    """Finds short patterns that select given parameters of a model and no others.

    Args:
        infos: the parameters of the model, by name.
        free: those that a pattern may select or not, since nothing trains them.
    """

    def __init__(self, infos: Mapping[str, ParamInfo], free: Names) -> None:
        self._infos = infos
        self._free = free
        self._all = frozenset(infos)
        self._atoms = _atoms(infos)

    def pattern(self, names: Names) -> str:
        """Return the shortest pattern found for these parameters."""
        free = self._free - names
        direct = self._union(names, names | free)
        others = self._all - names
        inverse = f"!({self._union(others - free, others)})" if others - free else "*"
        found = inverse if 2 * len(inverse) < len(direct) else direct
        # What the pattern language makes of a name is the judge; odd names are taken one by one.
        if not self._is_exact(found, names):
            found = " | ".join(sorted(names))
        return found

    def _union(self, wanted: Names, allowed: Names) -> str:
        """Return a pattern that selects all that is wanted, and nothing that is not allowed."""
        fits = {text: its for text, its in self._atoms.items() if its <= allowed}
        for size in _SIZES & self._atoms.keys():
            for text, its in self._atoms.items():
                both = its & self._atoms[size]
                if text not in _SIZES and both and both <= allowed:
                    fits[f"{text} & {size}"] = both
        chosen: list[str] = []
        missing = set(wanted)
        while missing:
            # The most of what is missing for each part; then the shortest.
            best = max(fits, key=lambda text: (len(fits[text] & missing), -len(text), text))
            chosen.append(best)
            missing -= fits[best]
        for text in list(chosen):  # what later choices have made needless
            rest = [other for other in chosen if other != text]
            if wanted <= frozenset[str]().union(*(fits[other] for other in rest)):
                chosen = rest
        return " | ".join(chosen)

    def _is_exact(self, text: str, names: Names) -> bool:
        pattern = compile_pattern(text)
        found = {name for name, info in self._infos.items() if pattern.matches(info)}
        return names <= found <= names | self._free


#: properties that divide matrices from norms and biases
_SIZES = {"ndim<2", "ndim>=2"}


def _atoms(infos: Mapping[str, ParamInfo]) -> dict[str, Names]:
    """Return simple patterns, each with the parameters that it selects."""
    found: dict[str, set[str]] = {"*": set(infos)}
    for name, info in infos.items():
        for text in _atoms_of(name, info):
            found.setdefault(text, set()).add(name)
    return {text: frozenset(names) for text, names in found.items()}


def _atoms_of(name: str, info: ParamInfo) -> Iterable[str]:
    yield name
    yield "ndim<2" if info.ndim < 2 else "ndim>=2"
    parts = name.split(".")
    for size in range(1, len(parts)):
        yield ".".join(parts[:size]) + ".*"
        yield "*." + ".".join(parts[size:])
    for part in parts[1:-1]:
        yield f"*.{part}.*"
    for kind in info.types:
        if kind != "Module":
            yield f"type:{kind}"
