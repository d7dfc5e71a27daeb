"""What clipping by hand was given, checked and named: tensors, modules, groups, limits."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import GeneratorType
from typing import Any

import torch
from torch import nn

from ..errors import HyperparameterError, LaminaWarning, PatternError, PlanError
from ..model.parameters import Owned, collect
from ..model.patterns import PatternLike, compile_pattern
from ..model.suggestions import nothing_matched

#: a tensor, tensors or `(name, tensor)` pairs, a parameter group, or a module
Parameters = torch.Tensor | Iterable[Any] | Mapping[str, Any] | nn.Module
#: one limit, or limits by pattern
Limits = Mapping[PatternLike, float]


@dataclass(frozen=True)
class Part:
    """Tensors with gradients that share a limit, each with a name for messages."""

    key: PatternLike
    limit: float
    named: list[tuple[str, torch.Tensor]]

    @property
    def grads(self) -> list[torch.Tensor]:
        return [tensor.grad for _, tensor in self.named if tensor.grad is not None]


def parts_of(parameters: Parameters, limit: float | Limits, argument: str) -> list[Part]:
    """Return what to clip, checked before anything is changed."""
    if not isinstance(limit, Mapping):
        number = number_of(limit, argument)  # before the parameters are looked at
        return [Part("*", number, _named(parameters))]
    if not isinstance(parameters, nn.Module):
        raise PlanError(
            f"{argument}={limit!r} has patterns, which need names; pass the module, not "
            f"{type(parameters).__name__}."
        )
    numbers = {pattern: number_of(number, argument) for pattern, number in limit.items()}
    owned = collect(parameters)
    chosen: dict[str, PatternLike] = {}
    for pattern in numbers:
        hit = [item.info.name for item in owned if compile_pattern(pattern).matches(item.info)]
        if not hit:
            said = nothing_matched(pattern, [item.info for item in owned])
            raise PatternError(f"{argument}: {pattern!r} {said}")
        chosen |= dict.fromkeys(hit, pattern)
    parts = []
    for pattern, number in numbers.items():
        mine = [item for item in owned if chosen.get(item.info.name) is pattern]
        parts.append(Part(pattern, number, _counted(mine)))
    return parts


def number_of(value: Any, argument: str, positive: bool = False) -> float:
    """Return a number of at least 0, from all that torch takes for one: "inf" and tensors too."""
    expected = "a number above 0" if positive else "a number of at least 0"
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise HyperparameterError(f"{argument}={value!r}: expected {expected}.") from error
    if number > 0 or (number == 0 and not positive):
        return number
    raise HyperparameterError(f"{argument}={value!r}: expected {expected}.")


def _counted(owned: Iterable[Owned]) -> list[tuple[str, torch.Tensor]]:
    """Return those parameters of a module that are trained and have a gradient."""
    trained = [item for item in owned if item.tensor.requires_grad]
    return [(repr(item.info.name), item.tensor) for item in trained if item.tensor.grad is not None]


def _named(parameters: Parameters) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors with a gradient, each once, with a name for messages."""
    if isinstance(parameters, nn.Module):
        return _counted(collect(parameters))
    if isinstance(parameters, torch.Tensor):
        return [("the tensor", parameters)] if parameters.grad is not None else []
    if isinstance(parameters, Mapping):
        tensors: list[Any] = list(parameters["params"])
        names = parameters.get("param_names")
        given: list[Any] = list(zip(names, tensors, strict=True)) if names else tensors
    else:
        if not isinstance(parameters, Iterable):
            raise PlanError(
                f"parameters={parameters!r}: expected a tensor, tensors, a parameter group or a "
                "module."
            )
        given = list(parameters)
        if not given and isinstance(parameters, GeneratorType):
            warnings.warn(
                "the generator of parameters is empty (used up before?); nothing is clipped.",
                LaminaWarning,
                stacklevel=5,
            )
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for index, item in enumerate(given):
        name, tensor = item if isinstance(item, tuple) else (None, item)
        if not isinstance(tensor, torch.Tensor):
            raise PlanError(
                f"parameters[{index}] is {tensor!r} ({type(tensor).__name__}); expected a tensor."
            )
        if tensor.grad is not None:
            place = f"parameter {index} of shape {tuple(tensor.shape)}"
            found.setdefault(id(tensor), (place if name is None else repr(name), tensor))
    return list(found.values())
