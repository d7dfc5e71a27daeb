"""The names of parameters in scripts that name no model: the model is found by its parameters."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..model.parameters import Owned, collect

#: so many optimizers with unknown parameters are followed to their models
_MOST_SEARCHES = 16


@dataclass
class Statistics:
    """A module with running statistics, and in how many looks in a row it was frozen."""

    path: str
    module: weakref.ref[nn.Module]
    frozen_looks: int = 0
    moved_looks: int = 0
    #: how often the statistics had been written at the last look, and some of the weights then
    version: int = -1
    weights: list[Any] = field(default_factory=list)


@dataclass
class Root:
    """A model, with its parameters by name as they were when it was first seen."""

    model: weakref.ref[nn.Module]
    #: the name of its class
    kind: str
    first: dict[str, weakref.ref[torch.Tensor]]
    ties: tuple[tuple[str, ...], ...]
    shapes: dict[str, tuple[int, ...]]
    #: modules with running statistics, with the names of the parameters that freeze them
    statistics: list[Statistics] = field(default_factory=list)
    #: in how many looks in a row it trained in eval mode, and the step of the first of them
    eval_looks: int = 0
    eval_since: int = 0


class Models:
    """Knows the models of a script, and the name of each of their parameters."""

    def __init__(self, given: Iterable[nn.Module] = ()) -> None:
        self.roots: list[Root] = []
        self._names: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._searches = 0
        for model in given:
            self.add(model)

    def add(self, model: nn.Module) -> None:
        """Remember a model, unless it is known."""
        if any(root.model() is model for root in self.roots):
            return
        owned = collect(model)
        root = Root(
            weakref.ref(model),
            type(model).__name__,
            {name: weakref.ref(item.tensor) for item in owned for name in item.info.names},
            tuple(item.info.names for item in owned if len(item.info.names) > 1),
            {item.info.name: item.info.shape for item in owned},
            [
                Statistics(path, weakref.ref(module))
                for path, module in model.named_modules()
                if isinstance(getattr(module, "running_mean", None), torch.Tensor)
            ],
        )
        self.roots.append(root)
        for item in owned:
            if item.tensor not in self._names:
                self._names[item.tensor] = item.info.name

    def learn(self, params: Sequence[torch.Tensor]) -> None:
        """Find the models that hold these parameters, if any of them has no name yet."""
        unknown = [param for param in params if param not in self._names]
        if not unknown or self._searches >= _MOST_SEARCHES:
            return
        self._searches += 1
        for model in _holders(unknown):
            self.add(model)

    def name(self, param: torch.Tensor) -> str | None:
        """Return the name of a parameter, or None."""
        found: str | None = self._names.get(param)
        return found

    def live(self) -> list[tuple[Root, nn.Module, tuple[Owned, ...]]]:
        """Return the models that still exist, with their parameters as they are now."""
        found = []
        for root in self.roots:
            model = root.model()
            if model is not None:
                found.append((root, model, collect(model)))
        return found


def _holders(params: Sequence[torch.Tensor]) -> list[nn.Module]:
    """Return the outermost modules around some parameters, those with most parameters first."""
    wanted = {id(param) for param in params}
    kinds = _kinds_of_modules()  # a set is asked faster than `issubclass`, a million times
    modules = [item for item in gc.get_objects() if type(item) in kinds]
    modules = [module for module in modules if "_parameters" in vars(module)]
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in vars(module).get("_modules", {}).values():
            if child is not None:
                parents.setdefault(id(child), []).append(module)
    top: dict[int, nn.Module] = {}
    seen: set[int] = set()
    waiting = [
        module
        for module in modules
        if any(id(param) in wanted for param in vars(module)["_parameters"].values())
    ]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        above = parents.get(id(module), [])
        waiting.extend(above)
        if not above:
            top[id(module)] = module
    return sorted(top.values(), key=_size, reverse=True)


def _kinds_of_modules() -> set[type]:
    found: set[type] = set()
    waiting: list[type] = [nn.Module]
    while waiting:
        kind = waiting.pop()
        if kind not in found:
            found.add(kind)
            waiting.extend(type.__subclasses__(kind))
    return found


def _size(model: nn.Module) -> int:
    return sum(1 for _ in model.parameters())


def part_names(silent: Iterable[str], trainable: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    """Split parameters into whole parts of a model, and those that stand beside others.

    Args:
        silent: the names of the parameters in question.
        trainable: the names of all parameters, and whether each trains.

    Returns:
        The largest parts (names of modules) all of whose training parameters are in question, and
        the names that are in no such part.
    """
    asked = set(silent)
    spoken: set[str] = set()  # modules with a training parameter that is not in question
    for name, trains in trainable.items():
        if trains and name not in asked:
            spoken.update(_modules_around(name))
    parts: dict[str, None] = {}
    alone = []
    for name in sorted(asked):
        whole = [path for path in _modules_around(name) if path not in spoken]
        if whole:
            parts[whole[0]] = None
        else:
            alone.append(name)
    return list(parts), alone


def _modules_around(name: str) -> list[str]:
    """Return the paths of the modules around a parameter, the outermost first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: length + 1]) for length in range(len(parts))]
