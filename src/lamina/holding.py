"""Modules whose parameters are all frozen rest as a whole: BatchNorm statistics and dropout too."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .parameters import Owned, subtrees


class Held:
    """Stands in for `train` on one module instance: remembers what was asked, stays in eval.

    A plain object in the module's `__dict__`, so that `model.train()` finds it, compiled models
    do too, and deepcopy and pickle carry it along; it knows nothing of an optimizer.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.asked = module.training

    def __call__(self, mode: bool = True) -> nn.Module:
        """What `module.train(mode)` does while the module is held."""
        self.asked = mode
        return nn.Module.train(self.module, False)


class Holder:
    """Holds exactly the outermost modules of a model whose parameters are all frozen."""

    def __init__(self, model: nn.Module, owned: Iterable[Owned]) -> None:
        self._subtrees = subtrees(model, owned)
        self._held: list[nn.Module] = []

    def set(self, frozen: Iterable[str]) -> None:
        """Hold the modules all of whose parameters (by name) are frozen, and no others."""
        names = set(frozen)
        wanted: list[tuple[str, nn.Module]] = []
        for path, module, below in self._subtrees:
            inside = any(known == "" or path.startswith(f"{known}.") for known, _ in wanted)
            if below <= names and not inside:
                wanted.append((path, module))
        for module in self._held:
            if not any(module is other for _, other in wanted):
                let_go(module)
        for _, module in wanted:
            hold(module)
        self._held = [module for _, module in wanted]


def hold(module: nn.Module) -> None:
    """Keep a module in eval mode through later calls of `train`."""
    if isinstance(module.__dict__.get("train"), Held):
        return
    module.__dict__["train"] = Held(module)
    nn.Module.train(module, False)


def let_go(module: nn.Module) -> None:
    """Undo `hold`; the module takes the mode that was last asked of it."""
    held = module.__dict__.get("train")
    if isinstance(held, Held):
        del module.__dict__["train"]
        module.train(held.asked)
