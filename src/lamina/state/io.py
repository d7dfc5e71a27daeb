"""The state of an optimizer under a plan, in the forms in which others save and load it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch

from .._util.sharding import is_flattened
from ..algorithms.base import ROUNDING_ENTRIES, state_dtype_of
from ..algorithms.registry import is_whole_vector, optimizer_name
from ..errors import StateError
from ..guests.guests import Guests
from ..guests.memory import OURS
from ..optim.updates import KernelUpdates, OptimizerState
from ..resolve.resolved import NEVER, Resolved
from .entries import evaluations
from .history import KEYS
from .schema import MOMENTUM

Groups = Sequence[dict[str, Any]]


def add_plan_state(state: dict[str, Any], groups: Groups, guests: Guests) -> dict[str, Any]:
    """Add to torch's state dict what a plan needs to continue from it.

    Args:
        state: what `torch.optim.Optimizer.state_dict` returned; it is changed and returned.
        groups: the live parameter groups.
        guests: the third-party optimizers of the plan.
    """
    if any(is_flattened(param) for group in groups for param in group["params"]):
        # FSDP1 puts states of a flat parameter together only if those it finds are alike.
        entries = state["state"].items()
        state["state"] = {n: entry for n, entry in entries if not _is_never_updated(entry)}
    for group in state["param_groups"]:
        # As one text, where numbers keep all their digits: torch loads no list into a shorter one.
        group.update({key: json.dumps(group[key]) for key in KEYS if key in group})
        for key in ("param_names", "run", "planned"):
            group[key] = deepcopy(group[key])
    for saved, group in zip(state["param_groups"], groups, strict=True):
        saved["param_shapes"] = [list(param.shape) for param in group["params"]]
    guests.write(state["param_groups"], state["state"])
    return state


def _is_never_updated(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry says no more than that a parameter was never updated."""
    return entry.keys() == {"step"} and not float(entry["step"])


def torch_form(state: dict[str, Any], resolved: Resolved, guests: Guests) -> dict[str, Any]:
    """Reduce a state dict to what torch's optimizer of the same name loads.

    Args:
        state: from `Optimizer.state_dict`.
        resolved: the resolved plan.
        guests: the third-party optimizers of the plan.

    Raises:
        StateError: if the plan uses several optimizers.
    """
    kinds = list(dict.fromkeys(cell.optimizer for cell in resolved.cells))
    if len(kinds) > 1:
        raise StateError(
            f"the plan uses {' and '.join(map(optimizer_name, kinds))}; torch's optimizers are "
            "of one kind, so that none can load this state."
        )
    ours = OURS - {"params", "param_names"}
    groups = [
        {key: value for key, value in group.items() if key not in ours}
        for group in state["param_groups"]
    ]
    rest = guests.restore_form(groups, state)
    own = {*ROUNDING_ENTRIES}  # which torch would cast to the dtype of the parameter
    if is_whole_vector(kinds[0]):  # torch's keeps no count, and writes its default out
        own = {"step", "places"}
        for group in groups:
            group["max_eval"] = evaluations(group)
    entries: dict[Any, Any] = {}
    for index, entry in state["state"].items():
        if isinstance(index, str):  # of no parameter: what a guest keeps beside them
            entries[index] = entry
        elif entry.keys() - {"step"}:
            entries[index] = {key: value for key, value in entry.items() if key not in own}
    return {"state": entries, "param_groups": groups, **rest}


@contextmanager
def room_for_loading(
    resolved: Resolved, groups: Groups, state: OptimizerState, updates: KernelUpdates
) -> Iterator[list[tuple[int, torch.Tensor, bool]]]:
    """Allocate all state that the plan may need, and turn `requires_grad` on, for a load in place.

    Yields:
        The place of each parameter's group, the parameter and its flag before; the caller sets
        back the flags that the load did not change.
    """
    flags: list[tuple[int, torch.Tensor, bool]] = []
    added: list[tuple[torch.Tensor, dict[str, Any], list[str]]] = []
    try:
        for place, (cell, group) in enumerate(zip(resolved.cells, groups, strict=True)):
            for param in group["params"] if cell.windows != NEVER else ():
                flags.append((place, param, param.requires_grad))
                param.requires_grad_(True)
                if cell.algorithm is not None:
                    entry = state[param]
                    before = set(entry)
                    _allocate_all(param, entry, group, updates)
                    added.append((param, entry, [*entry.keys() - before]))
        yield flags
    finally:
        for param, entry, keys in added:
            if state[param] is entry:  # the load exchanges the entries of what it has
                for key in keys:
                    del entry[key]


def _allocate_all(
    param: torch.Tensor, entry: dict[str, Any], group: dict[str, Any], updates: KernelUpdates
) -> None:
    updates.allocate(group, param, entry)
    # Whatever the momentum is now: a schedule or an override may have given it another value.
    if MOMENTUM in updates.algorithm_for(group).buffers and MOMENTUM not in entry:
        entry[MOMENTUM] = torch.full_like(param, math.nan, dtype=state_dtype_of(param, group))
