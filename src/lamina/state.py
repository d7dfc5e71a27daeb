"""Saved optimizer state, matched to the live parameters by name and shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from . import kernels
from .errors import PlanError, StateError
from .optim.registry import is_whole_vector, optimizer_name
from .overrides import check_override
from .parameters import clean_names
from .reporting import begin_all
from .resolved import Cell

if TYPE_CHECKING:
    from .optimizer import Optimizer


@dataclass(frozen=True)
class LoadReport:
    """What a load came to: names with state taken over, without state, and left out."""

    kept: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.kept)} parameters kept their state"]
        if self.missing:
            parts.append(f"new: {', '.join(self.missing)}")
        if self.dropped:
            parts.append(f"dropped: {', '.join(self.dropped)}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Loaded:
    """State ready to be put in place."""

    state: dict[torch.Tensor, dict[str, Any]]
    clock: int
    overrides: dict[str, list[Any]]
    feedback: dict[str, dict[str, Any]]
    report: LoadReport = field(default_factory=LoadReport)


def load_by_name(optimizer: Optimizer, saved: Mapping[str, Any]) -> Loaded:
    """Match a saved state dict to an optimizer; raises `StateError` and changes nothing."""
    groups = _groups(saved)
    whole = is_whole_vector(optimizer.resolved.cells[0].optimizer)
    entries = _by_name(groups, saved["state"])
    given = dict(entries)
    state: dict[torch.Tensor, dict[str, Any]] = {}
    kept: list[str] = []
    missing: list[str] = []
    for cell, group in zip(optimizer.resolved.cells, optimizer.param_groups, strict=True):
        for info, param in zip(cell.parameters, group["params"], strict=True):
            name = next((name for name in info.names if name in entries), None)
            entry = {} if name is None else entries.pop(name)
            state[param] = _entry(info.name, param, entry, whole)
            if not entry and cell.algorithm is None and not whole:
                state[param] = {}  # guests begin their state only where there is none at all
            (kept if entry else missing).append(info.name)
    clock = groups[0].get("clock", 0)
    if not isinstance(clock, int) or isinstance(clock, bool) or clock < 0:
        raise StateError(f"the saved clock is {clock!r}; expected a number of steps.")
    _refuse_lost(optimizer, groups, given, clock)
    saved_overrides = {g["name"]: list(g["overrides"]) for g in groups if g.get("overrides")}
    cells = {cell.name: cell for cell in optimizer.resolved.cells}
    overrides = {
        name: history
        for name, history in saved_overrides.items()
        if name in cells and _applies(cells[name], history)
    }
    lost = [f"override of {name!r}" for name in saved_overrides if name not in overrides]
    seen = {key: dict(value) for key, value in groups[0].get("feedback", {}).items()}
    feedback = {key: seen.get(key, new) for key, new in begin_all(optimizer.resolved).items()}
    report = LoadReport(tuple(kept), tuple(missing), (*entries, *lost))
    return Loaded(state, clock, overrides, feedback, report)


def _refuse_lost(
    optimizer: Optimizer,
    groups: list[dict[str, Any]],
    entries: Mapping[str, Mapping[str, Any]],
    clock: int,
) -> None:
    """Raise for state that torch.distributed.checkpoint lost on its way to `load_state_dict`.

    It reads only into tensors that exist, and leaves out what is frozen when it is loaded.
    """
    made_by = {name: group.get("optimizer") for group in groups for name in group["param_names"]}
    made_by = {clean: made_by[name] for name, clean in clean_names(made_by).items()}
    by_torch = all(isinstance(index, str) for group in groups for index in group["params"])
    for cell in optimizer.resolved.cells:
        if cell.algorithm is None:
            continue  # guests and a state over all parameters at once say nothing
        begins = any(isinstance(begin, int) and begin < clock for begin, _ in cell.windows)
        needs = cell.algorithm.init(torch.empty(0), cell.constants)
        for info in cell.parameters:
            name = next((name for name in info.names if name in entries), None)
            if name is None or made_by[name] != optimizer_name(cell.optimizer):
                continue
            entry = entries[name]
            left_out = not entry and begins and by_torch
            hollow = entry.keys() == {"step"} and needs and float(entry["step"]) > 0
            if left_out or hollow:
                what = "nothing" if left_out else "only the count of its updates"
                raise StateError(
                    f"the saved state holds {what} of {name!r}, which trained before step "
                    f"{clock}; nothing was loaded. torch.distributed.checkpoint reads only into "
                    "tensors that exist, and its set_optimizer_state_dict leaves out what is "
                    "frozen now: load with lamina.load_distributed(optimizer, folder), or give "
                    "optimizer.load_state_dict what get_optimizer_state_dict gave."
                )


def _groups(saved: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= set(saved):
        raise StateError("this is not an optimizer state: expected 'state' and 'param_groups'.")
    groups: list[dict[str, Any]] = list(saved["param_groups"])
    for group in groups:
        if len(group.get("param_names", ())) != len(group.get("params", ())):
            raise StateError(
                "the saved state has no parameter names, so it cannot be matched to a plan; save "
                "it from an optimizer built by a plan, or with named parameters."
            )
    if not groups:
        raise StateError("the saved state has no parameter groups.")
    return groups


def _by_name(groups: list[dict[str, Any]], state: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    names = [name for group in groups for name in group["param_names"]]
    indices = [index for group in groups for index in group["params"]]
    cleaned = clean_names(names)
    found = {}
    for name, index in zip(names, indices, strict=True):
        entry = state.get(index, {})
        if not isinstance(entry, Mapping):
            raise StateError(f"the saved state of {name!r} is {entry!r}; expected a dict.")
        found[cleaned[name]] = dict(entry)
    return found


def _applies(cell: Cell, history: Sequence[Any]) -> bool:
    """Whether the overrides of a saved group still fit what the plan makes of it."""
    try:
        for _, changed in history:
            if changed:
                check_override(cell, changed)
    except PlanError:
        return False
    return True


def _entry(name: str, param: torch.Tensor, saved: Mapping[str, Any], whole: bool) -> dict[str, Any]:
    """A parameter's state on its device; in the dtype it was saved in."""
    entry: dict[str, Any] = {"step": torch.zeros((), device=kernels.step_device(param))}
    for key, value in saved.items():
        if key == "step" and not isinstance(value, (int, float, torch.Tensor)):
            raise StateError(f"the saved step of {name!r} is {value!r}; nothing was loaded.")
        if key == "step":
            entry[key] = torch.as_tensor(value, dtype=torch.float32).to(kernels.step_device(param))
            entry[key] = entry[key].clone()
        elif isinstance(value, torch.Tensor):
            if value.ndim and value.shape != param.shape and not whole:
                raise StateError(
                    f"the saved {key} of {name!r} has shape {tuple(value.shape)}, but the "
                    f"parameter has {tuple(param.shape)}; nothing was loaded."
                )
            entry[key] = value.to(device=param.device, copy=True)
        else:
            entry[key] = value
    return entry
