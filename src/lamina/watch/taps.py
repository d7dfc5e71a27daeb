"""Where the watcher listens: torch's global hooks, and functions of torch that are wrapped.

Everything that the wrappers do beside the original call goes through a `Guard`. Nothing is written
into an object of the script: attributes of a scheduler, for example, would be in its `state_dict`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.data import DataLoader

from .guard import Guard
from .observer import Observer

Beside = Callable[[tuple[Any, ...], dict[str, Any]], object]
Failed = Callable[[tuple[Any, ...], dict[str, Any], Exception], object]


class Taps:
    """Connects an observer with torch, and takes every connection away again.

    Args:
        observer: what is told of each event.
        guard: what its methods are called through.
    """

    def __init__(self, observer: Observer, guard: Guard) -> None:
        self._observer = observer
        self._guard = guard
        self._wrapped: list[tuple[Any, str, Any, Any]] = []
        self._handles: list[Any] = []
        #: how deep a call of a scheduler is inside others: a composed one calls its parts
        self._depth = 0

    def install(self) -> None:
        """Begin to listen."""
        seen = self._observer
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        self._wrap(Optimizer, "__init__", after=lambda a, k: seen.built(a[0]))
        self._wrap(Optimizer, "add_param_group", failed=seen.group_refused)
        self._wrap(Optimizer, "zero_grad", after=lambda a, k: seen.optimizer_zeroed(a[0]))
        self._wrap(nn.Module, "zero_grad", after=lambda a, k: seen.module_zeroed(a[0]))
        self._wrap(torch.autograd, "backward", before=lambda a, k: seen.backward(_first(a, k)))
        self._wrap(nn.utils.clip_grad, "_clip_grads_with_norm_", before=seen.clipped)
        self._wrap(DataLoader, "__iter__", before=lambda a, k: seen.epoch_began(a[0]))
        scaler = torch.amp.GradScaler
        self._wrap(scaler, "scale", before=lambda a, k: seen.loss_scaled(a[0]))
        self._wrap(
            scaler,
            "step",
            before=lambda a, k: seen.scaler_steps(_second(a, k)),
            after=lambda a, k: seen.scaler_stepped(_second(a, k)),
        )
        self._wrap(scaler, "update", after=lambda a, k: seen.scaler_updated(a[0]))
        for kind in _schedulers():
            self._tap_scheduler(kind)

    def remove(self) -> None:
        """Stop listening for good, and put everything back.

        What was wrapped again by someone else since stays in place, and does nothing any more.
        """
        self._guard.close()
        self.disconnect()

    def disconnect(self) -> None:
        """Put everything back; `install` may follow."""
        for handle in self._handles:
            handle.remove()
        for owner, name, original, wrapper in reversed(self._wrapped):
            if vars(owner).get(name) is wrapper:
                setattr(owner, name, original)
        self._wrapped.clear()

    # --- optimizer steps -----------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        # Dynamo traces the hooks of a compiled step; it must find nothing here.
        if torch.compiler.is_compiling():
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        self._guard.call(self._observer.step_began, optimizer, closure)
        if not callable(closure):
            self._guard.call(self._observer.gradients_ready, optimizer)
            return None
        # Some trainers pass a closure to every optimizer: the gradients come in the step.
        watched = self._after_closure(closure, optimizer)
        if len(args) > 1:
            return (args[0], watched, *args[2:]), kwargs
        return args, {**kwargs, "closure": watched}

    def _after_closure(self, closure: Any, optimizer: Optimizer) -> Any:
        ready = False

        @functools.wraps(closure, updated=())
        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal ready
            loss = closure(*args, **kwargs)
            if not ready:  # LBFGS calls it again, in the middle of the step
                ready = True
                self._guard.call(self._observer.gradients_ready, optimizer)
            return loss

        return watched

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            self._guard.call(self._observer.step_ended, optimizer)

    # --- schedulers ----------------------------------------------------------------------------

    def _tap_scheduler(self, kind: type) -> None:
        """Listen to the constructor and the `step` that a class of schedulers defines."""
        taken = {(id(owner), name) for owner, name, _, _ in self._wrapped}
        for name, tap in (("__init__", self._around_init), ("step", self._around_step)):
            if name in vars(kind) and (id(kind), name) not in taken:
                self._replace(kind, name, tap(vars(kind)[name]))

    def _around_init(self, original: Any) -> Any:
        @functools.wraps(original)
        def init(scheduler: Any, *args: Any, **kwargs: Any) -> None:
            lr: list[Any] = []
            if self._depth == 0:
                self._guard.call(lambda: lr.extend(_lr_of(_optimizer_in(args, kwargs))))
            self._depth += 1
            try:
                original(scheduler, *args, **kwargs)
            finally:
                self._depth -= 1
            if self._depth == 0:
                self._guard.call(self._meet, scheduler, lr)

        return init

    def _meet(self, scheduler: Any, lr: list[Any]) -> None:
        # Classes that the script defined since; those of torch are tapped already.
        for kind in type(scheduler).__mro__:
            if issubclass(kind, lr_scheduler.LRScheduler):
                self._tap_scheduler(kind)
        self._observer.scheduler_built(scheduler, lr)

    def _around_step(self, original: Any) -> Any:
        @functools.wraps(original)
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                result = original(scheduler, *args, **kwargs)
            finally:
                self._depth -= 1
            if self._depth == 0:
                self._guard.call(self._observer.scheduler_stepped, scheduler)
            return result

        return step

    # --- wrapping ------------------------------------------------------------------------------

    def _wrap(
        self,
        owner: Any,
        name: str,
        before: Beside | None = None,
        after: Beside | None = None,
        failed: Failed | None = None,
    ) -> None:
        """Wrap a function of a class or module, if this version of torch has it."""
        original = vars(owner).get(name)
        if original is None:
            return
        call = self._guard.call

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return original(*args, **kwargs)
            if before is not None:
                call(before, args, kwargs)
            try:
                result = original(*args, **kwargs)
            except Exception as error:
                if failed is not None:
                    call(failed, args, kwargs, error)
                raise
            if after is not None:
                call(after, args, kwargs)
            return result

        self._replace(owner, name, wrapper)

    def _replace(self, owner: Any, name: str, wrapper: Any) -> None:
        self._wrapped.append((owner, name, vars(owner)[name], wrapper))
        setattr(owner, name, wrapper)


def _schedulers() -> Iterator[type]:
    """Return every class of schedulers that there is, each once."""
    found: dict[type, None] = {}
    waiting: list[type] = [lr_scheduler.LRScheduler]
    while waiting:
        kind = waiting.pop()
        if kind not in found:
            found[kind] = None
            waiting.extend(kind.__subclasses__())
    return iter(found)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("tensors")


def _second(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("optimizer")


def _optimizer_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("optimizer")


def _lr_of(optimizer: Any) -> list[Any]:
    groups = getattr(optimizer, "param_groups", ())
    return [group.get("lr") for group in groups]
