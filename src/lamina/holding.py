"""Modules whose parameters are all frozen rest as a whole: BatchNorm statistics and dropout too."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from .parameters import Owned, subtrees


class Held:
    """Stands in for `train` on one module: remembers the mode that was asked for, stays in eval.

    A plain object in the module's `__dict__`, so that `model.train()` finds it, compiled models
    do too, and deepcopy and pickle carry it along; it knows nothing of an optimizer.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.asked = module.training
        #: the mode asked for before the whole model was put in eval mode, else None
        self.earlier: bool | None = None
        self.model: weakref.ref[nn.Module] | None = None
        #: a `train` of the instance's own, as users patch it
        self.before: Callable[[bool], Any] | None = module.__dict__.get("train")
        self.on = True
        module.__dict__["train"] = self
        module.training = False

    def __call__(self, mode: bool = True) -> Any:
        """What `module.train(mode)` does while the module is held.

        The module's own `train` runs in the mode that was asked for last, and whatever it makes of
        it is the mode asked for now; children that are held do the same.
        """
        if not self.on:  # called from within, or kept by somebody after the end
            return self._own(mode)
        earlier = self.asked if self.earlier is None else self.earlier
        self.on, self.module.training = False, self.asked
        try:
            return self._own(mode)
        finally:
            self.on, self.asked, self.module.training = True, self.module.training, False
            model = self.model and self.model()
            whole = not mode and isinstance(model, nn.Module) and not asked_to_train(model)
            self.earlier = earlier if whole else None

    def end(self, model: nn.Module) -> None:
        """Take the mode that was asked for last, and `train` as it was.

        Some loops validate in eval mode and then assign each module the flag it had before, which
        of a held module is no news. So if the model trains again, what its eval mode brought along
        is over here as well.
        """
        if self.earlier is not None and asked_to_train(model):
            self.asked = self.earlier
        self.on, self.module.training = False, self.asked
        if self.before is None:
            del self.module.__dict__["train"]
        else:
            self.module.__dict__["train"] = self.before

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"model": None}  # a copy of a part does not copy the whole

    def _own(self, mode: bool) -> Any:
        if self.before is not None:
            return self.before(mode)
        return type(self.module).train(self.module, mode)


class Holder:
    """Holds exactly the modules of a model that a plan freezes as a whole."""

    def __init__(self, model: nn.Module, owned: Sequence[Owned]) -> None:
        self._model = model
        self._needs = needs(model, owned)
        by_hand = {item.info.name for item in owned if not item.info.requires_grad}
        #: what was held by hand before the plan; what an earlier plan held is not
        self._before = [module for module in self._resting(by_hand) if is_held(module)]

    def follow(self, frozen: Iterable[str], by_hand: Iterable[str]) -> None:
        """Hold the modules all of whose parameters (by name) are frozen, and no others.

        Those that are held already stay so, too, if the rest of their parameters is frozen by hand.
        """
        names = set(frozen)
        stay = [module for module in self._resting(names.union(by_hand)) if is_held(module)]
        self._hold([*self._resting(names), *stay])

    def release(self) -> None:
        """Hold what was held by hand before the plan, and nothing else."""
        self._hold(self._before)

    def _resting(self, names: set[str]) -> list[nn.Module]:
        return [module for module, need in self._needs if need <= names]

    def _hold(self, modules: Iterable[nn.Module]) -> None:
        wanted = set(map(id, modules))
        for module, _ in self._needs:
            if id(module) in wanted:
                hold(module, self._model)
            else:
                let_go(module, self._model)


def needs(model: nn.Module, owned: Iterable[Owned]) -> list[tuple[nn.Module, frozenset[str]]]:
    """Every module, and the names of the parameters that must all be frozen for it to rest.

    They are those below it; for a module without any, those of all modules that use it (one
    dropout may be in several places). A wrapper whose mode is that of the module inside (of a
    compiled model) is left out.
    """
    parts = subtrees(model, owned)
    found = {id(module): below for _, module, below in parts}
    bare: dict[int, frozenset[str]] = {}
    for _, module, below in parts:
        for child in module.children():
            for inside in child.modules() if id(child) not in found else ():
                bare[id(inside)] = bare.get(id(inside), frozenset()) | below
    found |= bare
    return [
        (module, found[id(module)])
        for module in model.modules()
        if not isinstance(getattr(type(module), "training", None), property)
    ]


def is_held(module: nn.Module) -> bool:
    """Whether a module is kept in eval mode."""
    return isinstance(module.__dict__.get("train"), Held)


def hold(module: nn.Module, model: nn.Module) -> None:
    """Keep a module of a model, itself, in eval mode through later calls of `train`."""
    held = module.__dict__.get("train")
    if not isinstance(held, Held):
        held = Held(module)
    held.model = weakref.ref(model)


def let_go(module: nn.Module, model: nn.Module) -> None:
    """Undo `hold` for a module of a model; it takes the mode that was last asked of it."""
    held = module.__dict__.get("train")
    if isinstance(held, Held):
        held.end(model)


def asked_to_train(module: nn.Module) -> bool:
    """Whether a module is in training mode, or would be if it were not held."""
    held = module.__dict__.get("train")
    return held.asked if isinstance(held, Held) and held.on else module.training
