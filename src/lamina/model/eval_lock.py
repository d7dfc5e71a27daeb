"""Modules whose parameters are all frozen stay in eval mode: BatchNorm statistics and dropout."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from torch import nn

from .parameters import Owned, module_paths, needs


class EvalLock:
    """Replaces `train` of one module: keeps it in eval mode and remembers the mode asked for.

    A plain object in the module's `__dict__`, so that `model.train()` finds it and compiled models
    do too. It knows nothing of an optimizer's state. Copies and pickles of the module do not take
    it along (see `FreeState`): they are in the mode that was asked for and follow `train`.
    Only what `lamina.freeze` locked stays locked in a copy, as its `requires_grad` stays off.
    """

    #: read by `parameters.is_locked`, which knows nothing of this class
    keeps_eval = True

    def __init__(
        self,
        module: nn.Module,
        asked: bool,
        before: Callable[[bool], Any] | None,
        earlier: bool | None = None,
        by_hand: bool = False,
    ) -> None:
        # of a copy, the module may be one whose `__dict__` is only about to be filled
        self._module = weakref.ref(module)
        self.asked = asked
        #: the mode asked for before the whole model was put in eval mode, else None
        self.earlier = earlier
        self.model: weakref.ref[nn.Module] | None = None
        #: a `train` of the instance's own, as users patch it
        self.before = before
        #: whether `lamina.freeze` asked for it
        self.by_hand = by_hand
        #: the optimizers that asked for it
        self.holders: weakref.WeakSet[EvalLocks] = weakref.WeakSet()
        self.on = True

    def install(self, module: nn.Module) -> None:
        """Put the lock in the place of the module's `train`, and the module in eval mode."""
        module.__dict__["train"] = self
        module.__dict__[FreeState.name] = FreeState(self)
        if hasattr(module, KeptStatistics.name):
            module.__dict__[KeptStatistics.name] = KeptStatistics(self)
        module.training = False

    @property
    def module(self) -> nn.Module:
        """The module that is kept in eval mode; whoever calls this has hold of it."""
        module = self._module()
        assert module is not None
        return module

    def __call__(self, mode: bool = True) -> Any:
        """Return what `module.train(mode)` does while the module is locked.

        The module's own `train` runs in the mode that was asked for last, and whatever it makes of
        it is the mode asked for now; children that are locked do the same.
        """
        module = self.module
        if not self.on:  # called from within, or kept by somebody after the end
            return self._own(mode)
        earlier = self.asked if self.earlier is None else self.earlier
        self.on, module.training = False, self.asked
        try:
            return self._own(mode)
        finally:
            self.on, self.asked, module.training = True, module.training, False
            model = self.model and self.model()
            whole = not mode and isinstance(model, nn.Module) and not asked_to_train(model)
            self.earlier = earlier if whole else None

    def mode(self, model: nn.Module | None) -> bool:
        """Return the mode that the module would have without the lock.

        Some loops validate in eval mode and then assign each module the flag it had before, which
        of a locked module is always False. So if the model trains again, what its eval mode brought
        along is over here as well.
        """
        if self.earlier is not None and model is not None and asked_to_train(model):
            return self.earlier
        return self.asked

    def end(self, model: nn.Module) -> None:
        """Give the module the mode that was asked for last, and `train` as it was."""
        module = self.module
        self.asked = self.mode(model)
        self.on, module.training = False, self.asked
        for name in _SHADOWED:
            module.__dict__.pop(name, None)
        if self.before is None:
            del module.__dict__["train"]
        else:
            module.__dict__["train"] = self.before

    def free(self, state: Any) -> Any:
        """Return the state of the module for a copy, without the lock."""
        if isinstance(state, tuple) and state:  # with slots
            return (self.free(state[0]), *state[1:])
        if self.by_hand or not isinstance(state, dict) or "training" not in state:
            return state
        free = {**state, "training": self.mode(None if self.model is None else self.model())}
        for name in ("train", *_SHADOWED):
            free.pop(name, None)
        if self.before is not None:
            free["train"] = self.before
        return free

    def __reduce__(self) -> tuple[Any, ...]:
        if self.by_hand:
            return EvalLock, (self.module, self.asked, self.before, self.earlier, True)
        # Only for modules that copy their `__dict__` by themselves: a plain `train` of the copy.
        if self.before is not None:
            return functools.partial, (self.before,)
        return getattr, (self.module, "train")

    def _own(self, mode: bool) -> Any:
        if self.before is not None:
            return self.before(mode)
        return type(self.module).train(self.module, mode)


class _Shadow:
    """Replaces a method of a locked module; only what was locked by hand keeps it in copies."""

    name: ClassVar[str]

    def __init__(self, lock: EvalLock) -> None:
        self._lock = lock

    def __reduce__(self) -> tuple[Any, ...]:
        if self._lock.by_hand:
            return type(self), (self._lock,)
        return getattr, (self._lock.module, self.name)


class FreeState(_Shadow):
    """Replaces `__getstate__` of a locked module, for which copy and pickle ask the instance."""

    name = "__getstate__"

    def __call__(self) -> Any:
        """Return the state for a copy, without the lock."""
        module = self._lock.module
        own = getattr(type(module), "__getstate__", None)
        return self._lock.free(module.__dict__ if own is None else own(module))


class KeptStatistics(_Shadow):
    """Replaces `reset_running_stats` of a locked module, whose statistics do not move either.

    `torch.optim.swa_utils.update_bn` resets them and then counts on training mode to fill them.
    """

    name = "reset_running_stats"

    def __call__(self) -> None:
        """Leave the statistics as they are."""


#: what a lock puts into a module's `__dict__` beside `train`
_SHADOWED = (FreeState.name, KeptStatistics.name)


class EvalLocks:
    """The locks of one optimizer, on exactly the modules that its plan freezes as a whole.

    A copy of the optimizer that is made together with its model locks the same modules of the copy.
    """

    def __init__(self, model: nn.Module, owned: Sequence[Owned]) -> None:
        self._model = model
        self._needs = needs(model, owned)
        paths = {id(module): path for path, module in module_paths(model).items()}
        self._paths = [paths.get(id(module), "") for module, _ in self._needs]
        #: locked by hand before the plan
        self._before = [
            module for module, _ in self._needs if (lock := lock_of(module)) and lock.by_hand
        ]

    def follow(self, frozen: Iterable[str], aside: Iterable[str]) -> None:
        """Lock the modules all of whose parameters are frozen by the plan, and no others.

        Locks by hand and of other optimizers stay where the rest is frozen in another way.

        Args:
            frozen: the names of the parameters whose modules rest by the plan.
            aside: the names of those frozen by hand, before the plan or since.
        """
        names = set(frozen)
        resting = names.union(aside)
        for module, need in self._needs:
            lock = lock_of(module)
            if need <= names:
                lock_eval(module, self._model).holders.add(self)
            elif lock is not None and need <= resting and self._is_wanted_by_others(lock):
                lock.holders.discard(self)
            elif lock is not None:
                lock.end(self._model)

    def release(self) -> None:
        """Leave locked what was locked by hand before the plan or is by another optimizer."""
        before = set(map(id, self._before))
        for module, _ in self._needs:
            lock = lock_of(module)
            if id(module) in before:
                lock_eval(module, self._model).by_hand = True
            elif lock is not None and not any(holder is not self for holder in lock.holders):
                lock.end(self._model)
            if lock is not None:
                lock.holders.discard(self)

    def snapshot(self) -> list[tuple[nn.Module, EvalLock | None, bool, bool]]:
        """Return the locks of all modules, whoever asked for them."""
        found = [(module, lock_of(module)) for module, _ in self._needs]
        return [(each, lock, each.training, bool(lock and lock.asked)) for each, lock in found]

    def restore(self, snapshot: list[tuple[nn.Module, EvalLock | None, bool, bool]]) -> None:
        """Give all modules the locks back that they had, and their modes."""
        for module, lock, mode, asked in snapshot:
            now = lock_of(module)
            if now is not None:
                now.holders.discard(self)
                if now is not lock:
                    now.end(self._model)
            if lock is not None and now is not lock:
                lock.on, lock.asked = True, asked
                lock.install(module)
            module.training = mode

    def exchanged(self, model: nn.Module) -> list[tuple[str, nn.Module, bool]]:
        """Return the modules of the build that are not in the model any more.

        Returns:
            The path of each, itself, and whether this optimizer keeps it in eval mode.
        """
        there = set(map(id, model.modules()))
        found = []
        for path, (module, _) in zip(self._paths, self._needs, strict=True):
            if id(module) not in there:
                lock = lock_of(module)
                found.append((path, module, lock is not None and self in lock.holders))
        return found

    def _is_wanted_by_others(self, lock: EvalLock) -> bool:
        return lock.by_hand or any(holder is not self for holder in lock.holders)

    def __getstate__(self) -> dict[str, Any]:
        locked = [
            (module, lock.asked, lock.earlier, self in lock.holders, lock.by_hand)
            for module, _ in self._needs
            for lock in [lock_of(module)]
            if lock is not None
        ]
        return {**self.__dict__, "locked": locked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        locked = state.pop("locked")
        self.__dict__.update(state)
        for module, asked, earlier, mine, by_hand in locked:
            # A module that holds this optimizer itself may not be whole yet.
            module.__dict__.setdefault("training", asked)
            lock = lock_eval(module, self._model)
            lock.asked, lock.earlier, lock.by_hand = asked, earlier, by_hand
            if mine:
                lock.holders.add(self)


def lock_of(module: nn.Module) -> EvalLock | None:
    """Return the lock of a module, if it has one."""
    lock = module.__dict__.get("train")
    return lock if isinstance(lock, EvalLock) else None


def lock_eval(module: nn.Module, model: nn.Module) -> EvalLock:
    """Keep a module of a model, itself, in eval mode through later calls of `train`."""
    lock = lock_of(module)
    if lock is None:
        lock = EvalLock(module, module.training, module.__dict__.get("train"))
        lock.install(module)
    lock.model = weakref.ref(model)
    return lock


def unlock_eval(module: nn.Module, model: nn.Module) -> None:
    """Undo `lock_eval` for a module of a model; it takes the mode that was last asked of it."""
    lock = lock_of(module)
    if lock is not None:
        lock.end(model)


def asked_to_train(module: nn.Module) -> bool:
    """Return whether a module is in training mode, or would be if it were not locked."""
    lock = lock_of(module)
    return lock.asked if lock is not None and lock.on else module.training
