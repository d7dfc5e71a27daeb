"""What has come apart since a plan was built: the model, its ties, its gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn

from .._util.sharding import is_flattened
from .._util.text import listed
from ..algorithms.registry import is_whole_vector
from ..model.adapters import is_adapter, merged_layers
from ..model.finding import Finding, adapters_removed, merged_adapters, moving_statistics
from ..model.parameters import (
    Owned,
    ParamInfo,
    collect,
    module_paths,
    observe,
    overlap_fix,
    overlaps,
)
from ..model.ties import broken, by_name, tie_again
from ..resolve.findings import model_findings, turned_off, turned_on
from ..resolve.resolved import Cell, Resolved
from ..resolve.timeline import Feedback
from ..runtime.freezing import Freezer
from ..runtime.gradient_tracker import GradientTracker
from ..state.report import LoadReport

_REBUILD = (
    "Build the optimizer from the plan again, after the change to the model, and load this one's "
    "state_dict()."
)
Groups = Sequence[Mapping[str, Any]]


def examine(
    resolved: Resolved,
    freezer: Freezer,
    groups: Sequence[dict[str, Any]],
    state: Mapping[torch.Tensor, Mapping[str, Any]],
    model: nn.Module,
    after: int,
    load: LoadReport | None,
    received: GradientTracker,
) -> tuple[Finding, ...]:
    """Return everything by which a model and the optimizer of a plan have come apart.

    Args:
        resolved: what the plan meant when it was built.
        freezer: what carries out its windows.
        groups: the optimizer's parameter groups.
        state: the optimizer's state.
        model: the model as it is now.
        after: how many steps a parameter may train without a gradient.
        load: what the last load came to, if there was one.
        received: who had a gradient, for optimizers that do not count.
    """
    owned = collect(model)
    live = by_name(owned)
    anew = (*load.new, *load.restarted) if load else ()
    rows = list(_rows(resolved, groups))
    there = {id(item.tensor) for item in owned}
    if not any(id(param) in there for _, _, param in rows):
        return (
            Finding(
                "another-model",
                "none of the model's parameters is one that this optimizer updates.",
                "Pass the model it was built for; for a copied or moved model, build it again.",
            ),
        )
    windows = {name: cell.windows for cell, info, _ in rows for name in info.names}
    order = {item.info.name: windows.get(item.info.name, ()) for item in owned}
    seen = observe(model, owned)
    return (
        *_ties(rows, live),
        *_exchanged(rows, live, there),
        *_exchanged_modules(freezer, model),
        *_unknown(resolved, owned, {id(param) for _, _, param in rows}),
        *_overlapping(owned),
        *_silent(rows, groups, state, after, anew, received),
        *_flags(freezer, groups),
        *moving_statistics(_frozen_by_hand(rows, freezer.active, resolved), seen),
        *model_findings(order, resolved.run, seen),
    )


def untrained(
    resolved: Resolved, groups: Groups, model: nn.Module, elsewhere: Set[int]
) -> list[Finding]:
    """Find parameters that took the place of others after the build, and so do not train.

    What was removed may be left out on purpose; adapters of PEFT are not, since what they were
    merged into does not train.

    Args:
        resolved: what the plan meant when it was built.
        groups: the optimizer's parameter groups.
        model: the model as it is now.
        elsewhere: the ids of parameters that other plans train.
    """
    owned = [item for item in collect(model) if id(item.tensor) not in elsewhere]
    rows = list(_rows(resolved, groups))
    updated = {id(param) for _, _, param in rows}
    there = {id(item.tensor) for item in owned} | elsewhere
    found = (
        *_exchanged(rows, by_name(owned), there),
        *_unknown(resolved, [item for item in owned if item.tensor.requires_grad], updated),
    )
    told = [each for each in found if each.code in ("parameter-replaced", "parameter-added")]
    present = {name for item in owned for name in item.info.names}
    trained = [info for cell, info, _ in rows if cell.windows]
    gone = [info.name for info in trained if not present.intersection(info.names)]
    if adapters := [name for name in gone if is_adapter(name)]:
        told.append(adapters_removed(adapters))
    return [*told, *merged_adapters(merged_layers(model))]


def _rows(resolved: Resolved, groups: Groups) -> Iterator[tuple[Cell, ParamInfo, torch.Tensor]]:
    for cell, group in zip(resolved.cells, groups, strict=True):
        for info, param in zip(cell.parameters, group["params"], strict=True):
            yield cell, info, param


Rows = Sequence[tuple[Cell, ParamInfo, torch.Tensor]]


def _ties(rows: Rows, live: Mapping[str, Owned]) -> Iterator[Finding]:
    """Find names that were one parameter at build and are several now."""
    for _, info, _ in rows:
        parts = broken(info.names, live)
        if len(parts) > 1:
            yield Finding(
                "tie-broken",
                f"{' = '.join(info.names)} were one parameter when the optimizer was built; "
                f"now they are {' and '.join(' = '.join(part) for part in parts)}.",
                f"Call {tie_again(parts)} right after what broke it (a deepcopy of a part, "
                "load_state_dict(assign=True), a move between devices), then build again.",
            )


def _exchanged(rows: Rows, live: Mapping[str, Owned], there: Set[int]) -> Iterator[Finding]:
    """Find parameters of the optimizer that are not in the model any more."""
    updated = {id(param) for _, _, param in rows}
    gone, replaced, tied = [], [], []
    for _, info, param in rows:
        if id(param) in there:
            continue
        now = [live[name] for name in info.names if name in live]
        if not now:
            gone.append(info.name)
        elif id(now[0].tensor) in updated:
            tied.append(" = ".join(now[0].info.names))
        else:
            replaced.append(info.name)
    told = [
        ("parameter-removed", gone, "is not in the model any more, so that its updates are lost"),
        ("tied-after-build", tied, "was tied after the optimizer was built, whose rules say two"),
        (
            "parameter-replaced",
            replaced,
            "was replaced after the optimizer was built, which updates the old one; the new one "
            "does not train",
        ),
    ]
    for code, names, what in told:
        if names:
            yield Finding(code, f"{listed(names)} {what}.", _REBUILD)


def _exchanged_modules(freezer: Freezer, model: nn.Module) -> Iterator[Finding]:
    """Find modules that were exchanged around their parameters, as by a conversion of BatchNorm."""
    now = module_paths(model)
    locked, around = [], []
    for path, module, is_locked in freezer.locks.exchanged(model):
        what = f"{path or 'the model'} ({type(module).__name__}"
        what += f", now {type(now[path]).__name__})" if path in now else ", now removed)"
        if is_locked:
            locked.append(what)
        elif _converted(module, now.get(path)):
            around.append(what)
    fix = (
        "Convert the model before Plan.build. For this one, build the optimizer again from the "
        "plan, with resume=optimizer.state_dict()."
    )
    told = [
        ("kept in eval mode by the plan; what took its place follows train()", locked),
        ("exchanged after the optimizer was built; its parameters are the same", around),
    ]
    for how, names in told:
        if names:
            yield Finding("module-replaced", f"{listed(names)} was {how}.", fix)


def _converted(old: nn.Module, new: nn.Module | None) -> bool:
    """Return whether a module of another class took over parameters of one in its place."""
    params = {id(param) for param in old._parameters.values() if param is not None}
    return type(new) is not type(old) and any(
        id(param) in params for param in (new._parameters.values() if new is not None else ())
    )


def _unknown(resolved: Resolved, owned: Sequence[Owned], updated: Set[int]) -> Iterator[Finding]:
    known = resolved.cell_of
    names = [
        item.info.name
        for item in owned
        if not known.keys() & set(item.info.names) and id(item.tensor) not in updated
    ]
    what = f"{listed(names)} came into the model after the optimizer was built; it does not train."
    if names:
        yield Finding("parameter-added", what, _REBUILD)


def _overlapping(owned: Sequence[Owned]) -> Iterator[Finding]:
    for one, other in overlaps(owned):
        what = f"{one.info.name!r} and {other.info.name!r} are two Parameters over the same memory."
        yield Finding("shared-memory", what, overlap_fix(one, other))


def _silent(
    rows: Rows,
    groups: Groups,
    state: Mapping[torch.Tensor, Mapping[str, Any]],
    after: int,
    new: Sequence[str],
    received: GradientTracker,
) -> Iterator[Finding]:
    """Find parameters that trained for some steps and never received a gradient."""
    clock, seen = groups[0]["clock"], groups[0]["feedback"]
    names = []
    for cell, info, param in rows:
        spans = Feedback(seen=seen).windows(cell)
        if cell.algorithm is None or is_whole_vector(cell.optimizer):
            silent, since = info.name not in received.names, float(received.since)
        else:
            silent = info.name not in new and not float(state[param]["step"])
            silent = silent and (param.numel() > 0 or not is_flattened(param))  # no part of it here
            since = _count_began(cell, spans, clock)
        steps = sum(max(0, min(clock, end) - max(start, since)) for start, end in spans)
        if silent and steps >= after:
            names.append(info.name)
    if names:
        yield Finding(
            "no-gradient",
            f"{listed(names)} never received a gradient, in at least {after} steps.",
            "See whether the loss depends on it (a layer not used, a detach, a branch not taken); "
            "if that is meant, freeze it.",
        )


def _count_began(cell: Cell, spans: Sequence[tuple[float, float]], clock: int) -> float:
    """Return the step from which the updates of a cell's parameters are counted."""
    if cell.frozen_state == "keep":
        return 0
    return next((start for start, end in spans if start <= clock < end), clock)


def _flags(freezer: Freezer, groups: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Find parameters whose `requires_grad` contradicts the plan."""
    off: list[str] = []
    on: dict[bool, list[str]] = {}
    for cell, names, params in freezer.turned(groups):
        (on.setdefault(cell.by_model, []) if params[0].requires_grad else off).extend(names)
    for by_model, names in on.items():
        yield turned_on(names, by_model)
    if off:
        yield turned_off(off)


def _frozen_by_hand(
    rows: Rows, active: Sequence[bool | None], resolved: Resolved
) -> dict[str, bool]:
    """Return for each name whether the parameter was frozen by hand, before the plan or since."""
    trains = {id(cell): now for cell, now in zip(resolved.cells, active, strict=True)}
    return {
        name: not param.requires_grad and (cell.by_model or bool(trains[id(cell)]))
        for cell, info, param in rows
        for name in info.names
    }
