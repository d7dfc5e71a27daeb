"""The ways to take one step that are compared: lamina's, torch's, and those of other packages.

Each is built as its documentation advises for speed. All of one algorithm have equal settings.
"""

from __future__ import annotations

import importlib
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import lamina as lm

from .naive import NaiveLayerAdaptiveAdam
from .tensors import LR, Holder, Tensors, group_of, grouped, rate_of

CLIP = 1.0
SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW": {"weight_decay": 0.01},
    "SGD": {"momentum": 0.9},
    "RMSprop": {},
    "LAMB": {"weight_decay": 0.01},
    "LARS": {"momentum": 0.9, "weight_decay": 1e-4},
    "LayerAdaptiveAdam": {},
    "Muon": {"weight_decay": 0.1},
}


class Absent(Exception):
    """A candidate that cannot run here, with the reason."""


def imported(module: str, package: str) -> Any:
    """A module that may be absent; what needs it is then left out."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"{package} is not installed") from error


@dataclass(frozen=True)
class Built:
    """A candidate that is ready to step."""

    params: list[nn.Parameter]
    step: Callable[[], object]
    optimizer: Any = None

    def kernels(self) -> str | None:
        """What lamina's optimizer says of its kernels, each sentence once."""
        told = getattr(self.optimizer, "kernels", None)
        if told is None:
            return None
        found = told()
        reasons = found.values() if isinstance(found, Mapping) else found
        return " | ".join(dict.fromkeys(str(reason) for reason in reasons))


@dataclass(frozen=True)
class Candidate:
    """How to build one way to step: from tensors, number of groups, and whether it clips.

    `exact` says that it computes what the first candidate of its algorithm does, which is checked;
    `clips` whether it takes part where gradients are clipped.
    """

    build: Callable[[Tensors, int, bool], Built]
    exact: bool = True
    clips: bool = True


def plain(
    make: Callable[..., Any], tensors: Tensors, groups: int, clip: bool, **settings: Any
) -> Built:
    """An optimizer over groups, with torch's function for clipping."""
    params = tensors.params()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of foreach in torch-optimi
        optimizer = make(grouped(params, groups), lr=LR, **settings)

    def step() -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()

    return Built(params, step, optimizer)


def compiled(
    make: Callable[..., Any], tensors: Tensors, groups: int, clip: bool, **settings: Any
) -> Built:
    """The same as one compiled function, so that clipping is fused too.

    The learning rate is a number, with which torch makes the fastest code; it would have to be a
    tensor, and foreach off, for a schedule not to compile again at every step.
    """
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise Absent("torch.compile needs a C++ compiler, and there is none")
    logging.getLogger("torch").setLevel(logging.ERROR)  # hooks of the profiler, which it leaves out
    torch._dynamo.reset()
    built = plain(make, tensors, groups, clip, **settings)
    step = torch.compile(built.step)
    return Built(built.params, step, built.optimizer)


def drop_in(name: str, tensors: Tensors, groups: int, clip: bool, **settings: Any) -> Built:
    """lamina's optimizer and clipping as drop-in replacements for torch's."""
    params = tensors.params()
    optimizer = getattr(lm.optim, name)(grouped(params, groups), lr=LR, **settings)

    def step() -> None:
        if clip:
            lm.clip_grad_norm_(params, CLIP)
        optimizer.step()

    return Built(params, step, optimizer)


def planned(name: str, tensors: Tensors, groups: int, clip: bool, **settings: Any) -> Built:
    """A plan with the same groups, which clips by itself and checks every gradient."""
    params, names = tensors.params(), list(tensors.shapes)
    rates = {
        Holder.plain(each): rate_of(group_of(index, len(names), groups))
        for index, each in enumerate(names)
    }
    plan = lm.Plan(
        getattr(lm.optim, name),
        lr=LR if groups == 1 else lambda info: rates[info.name],
        clip_norm=CLIP if clip else None,
        **settings,
    )
    optimizer = plan.build(Holder(names, params))
    return Built(params, optimizer.step, optimizer)


def unchecked(*arguments: Any, **settings: Any) -> Built:
    """A plan that does not look for NaN, as the others do not; where it clips, the norm tells."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lm.LaminaWarning)  # it says that nothing is looked at
        return planned(*arguments, nonfinite_check="norms", **settings)


def candidates(algorithm: str) -> dict[str, Candidate]:
    """Every candidate of an algorithm by name; those of lamina come last."""
    settings = SETTINGS[algorithm]
    found = {
        name: replace(candidate, build=partial(candidate.build, **settings))
        for name, candidate in _OTHERS[algorithm]().items()
    }
    found["lamina plan"] = Candidate(partial(planned, algorithm, **settings))
    found["lamina plan unchecked"] = Candidate(
        partial(unchecked, algorithm, **settings), clips=False
    )
    found["lamina drop-in"] = Candidate(partial(drop_in, algorithm, **settings))
    return found


def _torch(name: str, *, fused: bool = True, foreach: bool = True) -> dict[str, Candidate]:
    make = getattr(torch.optim, name)
    found = {"torch default": Candidate(partial(plain, make))}
    if foreach:
        found["torch foreach"] = Candidate(partial(plain, make, foreach=True))
        found["torch compiled"] = Candidate(partial(compiled, make, foreach=True))
    if fused:
        found["torch fused"] = Candidate(partial(plain, make, fused=True))
        found["torch fused again"] = Candidate(partial(plain, make, fused=True))
    else:
        found["torch default again"] = Candidate(partial(plain, make))
    return found


def _adamw() -> dict[str, Candidate]:
    return {**_torch("AdamW"), **_optimi("AdamW", betas=(0.9, 0.999), eps=1e-8), **_adafactor()}


def _sgd() -> dict[str, Candidate]:
    return {**_torch("SGD"), **_optimi("SGD")}


def _rmsprop() -> dict[str, Candidate]:
    return _torch("RMSprop", fused=False)


def _muon() -> dict[str, Candidate]:
    return _torch("Muon", fused=False, foreach=False)


def _optimi(name: str, **settings: Any) -> dict[str, Candidate]:
    def build(*arguments: Any, foreach: bool | None = None, **others: Any) -> Built:
        make = getattr(imported("optimi", "torch-optimi"), name)
        return plain(make, *arguments, foreach=foreach, **settings, **others)

    return {
        "torch-optimi": Candidate(build),
        "torch-optimi foreach": Candidate(partial(build, foreach=True)),
    }


def _adafactor() -> dict[str, Candidate]:
    def build(*arguments: Any, **settings: Any) -> Built:
        adafactor = imported("transformers.optimization", "transformers").Adafactor
        make = partial(adafactor, scale_parameter=False, relative_step=False)
        return plain(make, *arguments, **settings)

    return {"Adafactor of Transformers": Candidate(build, exact=False)}


def _pytorch_optimizer(name: str) -> dict[str, Candidate]:
    """Their rules differ in details, so that results are not compared."""

    def build(*arguments: Any, how: Callable[..., Built] = plain, **settings: Any) -> Built:
        package = imported("pytorch_optimizer", "pytorch_optimizer")
        return how(getattr(package, name), *arguments, **settings)

    def build_compiled(*arguments: Any, **settings: Any) -> Built:
        if name == "Lamb":
            raise Absent("torch.compile had not ended after nine minutes, and was stopped")
        return build(*arguments, how=compiled, foreach=True, **settings)

    return {
        "pytorch_optimizer loop": Candidate(partial(build, foreach=False), exact=False),
        "pytorch_optimizer": Candidate(partial(build, foreach=True), exact=False),
        "pytorch_optimizer again": Candidate(partial(build, foreach=True), exact=False),
        "pytorch_optimizer compiled": Candidate(build_compiled, exact=False),
    }


def _naive() -> dict[str, Candidate]:
    loop = partial(plain, NaiveLayerAdaptiveAdam)
    return {
        "naive": Candidate(loop),
        "naive again": Candidate(loop),
        "naive with .item()": Candidate(partial(loop, item=True)),
    }


_OTHERS: dict[str, Callable[[], dict[str, Candidate]]] = {
    "AdamW": _adamw,
    "SGD": _sgd,
    "RMSprop": _rmsprop,
    "LAMB": lambda: _pytorch_optimizer("Lamb"),
    "LARS": lambda: _pytorch_optimizer("LARS"),
    "LayerAdaptiveAdam": _naive,
    "Muon": _muon,
}
