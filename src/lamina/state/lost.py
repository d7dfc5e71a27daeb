"""State that torch.distributed.checkpoint leaves out on its way in: an error, not a new beginning.

It reads in place, so that it skips what has no tensors yet, and what is frozen for now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .._util.text import listed
from ..algorithms.registry import is_whole_vector
from ..errors import StateError
from ..guests.build import keeps_state
from ..resolve.resolved import Cell, Resolved
from ..resolve.timeline import Feedback, values_at
from .entries import belongs, has_state
from .schema import Entry

_LOAD = "Load with lamina.load_distributed(optimizer, folder)"


def refuse_lost(
    resolved: Resolved,
    groups: Iterable[Mapping[str, Any]],
    entries: Mapping[str, Entry],
    clock: int,
    feedback: Feedback,
) -> None:
    """Raise `StateError` if state that the plan must have had at the clock is not there.

    Only for states by name, which may have come through torch's `set_optimizer_state_dict`.
    """
    now = values_at(resolved, clock, feedback)
    frozen, lost = [], []
    for index, (cell, group) in enumerate(zip(resolved.cells, groups, strict=True)):
        dropped = cell.frozen_state == "drop" and not now.active(index)
        if dropped or not has_begun(cell, clock - 1, feedback):
            continue
        pairs = zip(cell.parameters, group["params"], strict=True)
        found = [(entries[i.name], i.name, p) for i, p in pairs if i.name in entries]
        frozen += [name for e, name, p in found if e.values is None and not p.requires_grad]
        own = cell.algorithm is not None or is_whole_vector(cell.optimizer)
        # A parameter without any gradient has no state; that none of a group had one is unlikely.
        if own or not found or any(has_state(e) or not belongs(e, cell) for e, _, _ in found):
            continue
        last = values_at(resolved, clock - 1, feedback).hyper(index)
        if keeps_state(cell, last, group["params"][0]):
            lost += [name for _, name, _ in found]
    if frozen:
        raise StateError(
            f"the state of {listed(frozen)} is missing: torch.distributed.checkpoint leaves out "
            f"parameters that are frozen while it loads. {_LOAD}, or inside `with "
            "optimizer.receiving():`, or give its state to optimizer.load_state_dict."
        )
    if clock and is_whole_vector(resolved.cells[0].optimizer):
        lost = _without_memory(resolved, entries)
    if lost:
        raise StateError(
            f"the state of {listed(lost)} is empty after {clock} steps: "
            "torch.distributed.checkpoint reads only into tensors that exist, which guests and "
            f"LBFGS make at their first update. {_LOAD}, or give a complete state to "
            "optimizer.load_state_dict."
        )


def _without_memory(resolved: Resolved, entries: Mapping[str, Entry]) -> list[str]:
    """Return the parameters of L-BFGS, if the memory that its first step makes is not whole."""
    cell = resolved.cells[0]
    if not entries or not all(belongs(entry, cell) for entry in entries.values()):
        return []
    memory: Mapping[str, Any] = next(
        (e.values for e in entries.values() if e.values and "func_evals" in e.values), {}
    )
    # Without a direction only where the first gradient was small enough already.
    whole = "func_evals" in memory and (not memory.get("n_iter") or memory.get("d") is not None)
    return [] if whole else [*entries]


def has_begun(cell: Cell, clock: int, feedback: Feedback) -> bool:
    """Return whether a cell trains at the clock, or has trained before."""
    return any(begin <= clock for begin, _ in feedback.windows(cell))
