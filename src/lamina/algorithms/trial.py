"""Third-party optimizer classes tried on small tensors: what they put into their groups, and read.

A signature does not tell it: `**kwargs` may be handed on or kept, a default may be worked out when
the optimizer is built, and a group may need a key that no constructor has.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import random
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

#: an argument without a default
REQUIRED = inspect.Parameter.empty
_VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


class RecordingGroup(dict[str, Any]):
    """A parameter group that remembers which of its keys were read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or the default."""
        self.read.add(key)
        return super().get(key, default)


@dataclass(frozen=True)
class Trial:
    """What is known of a class from building it over one small tensor.

    `made` is what it put into its group (None if it could not be built, with `error`), `needed` the
    arguments without a default that it was given; `read` the keys of the group that it read in one
    step (None if the step failed); `wraps` the attribute in which it holds another optimizer.
    """

    made: Mapping[str, Any] | None
    needed: frozenset[str] = frozenset()
    read: frozenset[str] | None = None
    wraps: str = ""
    error: str = ""


_known: WeakKeyDictionary[type, Trial] = WeakKeyDictionary()


def trial_of(optimizer: type[torch.optim.Optimizer]) -> Trial:
    """Return what a trial build of a class tells, with its defaults; each class is built once."""
    found = _known.get(optimizer)
    if found is None:
        own, inherited = required(optimizer)
        with quietly(), torch.enable_grad():
            found = _tried(optimizer, own)
            if found.made is None and inherited:
                found = _tried(optimizer, own | inherited)
        _known[optimizer] = found
    return found


def _tried(optimizer: type[torch.optim.Optimizer], needed: frozenset[str]) -> Trial:
    param = torch.nn.Parameter(torch.full((2, 3), 0.5))
    given = {key: 1e-3 if key == "lr" else 1 for key in needed}
    try:
        guest = over([RecordingGroup(params=[param])], optimizer, given)
        group = guest.param_groups[0]
        made = {key: _number(value) for key, value in group.items() if key not in given}
        del made["params"]
    except Exception as error:
        return Trial(None, error=f"{type(error).__name__}: {error}")
    wraps = next((k for k, v in vars(guest).items() if isinstance(v, torch.optim.Optimizer)), "")
    param.grad = torch.full_like(param, 0.1)
    try:
        into_training(guest)
        guest.step()
    except Exception as error:
        return Trial(made, needed, None, wraps, f"{type(error).__name__}: {error}")
    read = frozenset(group.read) if isinstance(group, RecordingGroup) else None
    return Trial(made, needed, read, wraps)


def over(
    groups: list[RecordingGroup], optimizer: type[torch.optim.Optimizer], given: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Build an optimizer over groups; some take a single one as a list of tensors alone."""
    plain = list(groups[0]["params"]) if len(groups) == 1 and len(groups[0]) == 1 else None
    try:
        return optimizer(groups, **given)
    except Exception:
        if plain is not None:
            with contextlib.suppress(Exception):
                return optimizer(plain, **given)
        raise


def into_training(guest: torch.optim.Optimizer) -> None:
    """Call `train()` on an optimizer that has modes."""
    train = getattr(guest, "train", None)
    if callable(train):
        train()


def _number(value: Any) -> Any:
    """Return the number in a tensor of one, as some keep their learning rate; else the value."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta:
        return value.item()
    return value


@contextlib.contextmanager
def quietly(device: torch.device | None = None) -> Iterator[None]:
    """Let a trial leave no trace: no warnings, no output, no random numbers used, no compiling."""
    devices = [] if device is None or device.type == "cpu" else [device]
    kind = devices[0].type if devices else "cuda"
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        torch.random.fork_rng(devices, device_type=kind),
        _uncompiled(),
    ):
        warnings.simplefilter("ignore")
        numbers = random.getstate()
        try:
            yield
        finally:
            random.setstate(numbers)


def seed(number: int) -> None:
    """Let the sources of random numbers that an optimizer may draw from begin at a number."""
    torch.manual_seed(number)
    random.seed(number)


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    # It imports dynamo, which takes seconds; who compiles a step has done so already.
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def first_argument(optimizer: type) -> str:
    """Return the name of what a constructor takes first."""
    return next(iter(inspect.signature(optimizer).parameters), "")


def arguments(optimizer: type) -> dict[str, Any]:
    """Return what a constructor takes by name beside the parameters, with the defaults.

    One with `**kwargs` may hand them on to the next base class, so that its arguments count too.
    """
    found: dict[str, Any] = {}
    for listed in _listed(optimizer):
        found = {**found, **{key: value for key, value in listed.items() if key not in found}}
    return found


def required(optimizer: type) -> tuple[frozenset[str], frozenset[str]]:
    """Return the arguments without a default: of the class itself, and of its bases alone.

    The latter are given by the class, or handed on to by it: only a trial can tell.
    """
    own, *bases = _listed(optimizer) or [{}]
    needed = {key for key, default in own.items() if default is REQUIRED}
    inherited = {k for listed in bases for k, v in listed.items() if v is REQUIRED} - own.keys()
    return frozenset(needed), frozenset(inherited)


def signature_of(optimizer: type) -> dict[str, Any]:
    """Return the named arguments of the class's own constructor, or of the one it inherits."""
    return next(iter(_listed(optimizer)), {})


def takes_any(optimizer: type) -> bool:
    """Return whether a constructor takes arguments that it does not name."""
    kinds = {each.kind for each in inspect.signature(optimizer).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


def _listed(optimizer: type) -> list[dict[str, Any]]:
    """List the named arguments of each constructor that may be reached."""
    found = []
    for base in optimizer.__mro__:
        if base is torch.optim.Optimizer:
            break
        if "__init__" not in vars(base):
            continue
        listed = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        named = [each for each in listed if each.kind not in _VARIADIC]
        if named and named[0].kind is not inspect.Parameter.KEYWORD_ONLY:
            named = named[1:]  # the parameters, or what else stands first
        found.append({each.name: each.default for each in named})
        if all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in listed):
            break
    return found
