"""A copy of a model that may run for nothing: whatever a pass changes, the model does not see."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._util.randomness import Randomness

#: what a module keeps hooks of a forward pass in
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)

#: attributes of a LightningModule that would bring trainer, data and optimizer into a copy
_LEADS_OUT = ("_trainer", "configure_optimizers")


def copy_to_try(model: nn.Module) -> nn.Module:
    """Return a copy with the same parameters (not copies of them), modes, and no hooks.

    Buffers and attributes are its own. A `forward` that somebody put on an instance is not taken
    along: it may be bound to the model.

    Raises:
        Exception: whatever an attribute raises that cannot be copied.
    """
    memo: dict[int, Any] = {id(param): param for param in model.parameters()}
    for module in model.modules():
        for name in _HOOKS:
            memo[id(module.__dict__.get(name))] = OrderedDict()
        forward = module.__dict__.get("forward")
        if forward is not None:
            memo[id(forward)] = None
        for name in _LEADS_OUT:
            memo[id(module.__dict__.get(name))] = None
    memo.pop(id(None), None)
    with torch.inference_mode(False):
        twin = copy.deepcopy(model, memo)
    for module, original in zip(twin.modules(), model.modules(), strict=True):
        module.__dict__.pop("forward", None)
        # Copies do not take eval locks along; the mode of now is what a pass would run in.
        module.__dict__["training"] = original.training
    return twin


def compiled_paths(model: nn.Module) -> set[str]:
    """Return the paths of the modules that torch.compile is on."""
    return {
        path
        for path, module in model.named_modules()
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
    }


def without_compiled(twin: nn.Module) -> nn.Module:
    """Put the plain modules of a copy in the place of compiled ones, and return it."""
    for module in list(twin.modules()):
        module._compiled_call_impl = None
        for name, child in module._modules.items():
            if child is not None and type(child).__name__ == "OptimizedModule":
                module._modules[name] = child.get_submodule("_orig_mod")
    return twin


def lies_in(path: str, outer: Iterable[str]) -> bool:
    """Return whether a path is one of others, or lies below one."""
    return any(path == one or path.startswith(f"{one}.") for one in outer)


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor was changed in place; tensors of inference mode do not count it."""
    return -1 if tensor.is_inference() else tensor._version


def has_hooks(module: nn.Module) -> bool:
    """Return whether somebody's hooks run in a forward pass of this very module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def own_way_of(model: nn.Module, hook: int) -> str:
    """Return what keeps the passes of a model from being those of its class; empty if nothing does.

    Args:
        model: the model itself, not a part of it.
        hook: the identity of our own hook, after which none may change the inputs.
    """
    if list(model._forward_pre_hooks)[-1:] != [hook]:
        return "has got another hook before its forward pass, which may change its inputs"
    forward = model.__dict__.get("forward")
    if forward is None or _is_autocast_of_accelerate(forward, model):
        return ""
    return "has a forward of its own, put there by hand"


def _is_autocast_of_accelerate(forward: Any, model: nn.Module) -> bool:
    """Return whether a forward is that of the class, but for autocast around it."""
    function = getattr(forward, "__func__", forward)
    if getattr(function, "__module__", "") != "accelerate.utils.operations":
        return False
    of_class = type(model).forward  # which may be decorated itself
    return inspect.unwrap(function, stop=lambda inner: inner is of_class) is of_class


class Stub:
    """A `forward` that stands in for another one; `before` is what the instance had of its own."""

    def __init__(self, forward: Callable[..., Any], before: Any) -> None:
        self.forward = forward
        self.before = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the replacement returns."""
        return self.forward(*args, **kwargs)


def own_forward(module: nn.Module) -> Any:
    """Return a `forward` that somebody put on this instance; None if it has that of its class."""
    forward = module.__dict__.get("forward")
    return forward.before if isinstance(forward, Stub) else forward


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let calls of a module run another `forward` inside."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """Put every random source back at the end to what it was."""
    sources = Randomness(device)
    before = sources.now()
    try:
        yield
    finally:
        sources.set(before)


class Hook:
    """A hook of a session; copies and pickles of the model do not take the session along."""

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        if self._call is not None:
            self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, ()
