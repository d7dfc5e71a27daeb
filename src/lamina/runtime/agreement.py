"""That all processes which train together carry out the same plan.

With different plans each process would change its copy of a weight otherwise, or one would wait for
a sum that no other computes. Waiting for the others to compare would hang where only some build.
So each process leaves a note in the store through which the group found together, and reads those
that are there: of two that differ, at least the later one sees it when it builds, and the other in
its first step.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch

from .._util.sharding import is_distributed
from ..errors import LaminaError, PlanError, shortened
from ..plan.plan import Plan
from ..resolve.resolved import Resolved

#: builds of this process by what they train: its second is compared with the second of others
_built: dict[str, int] = {}
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class Agreement:
    """Compares a plan with those of the other processes.

    Args:
        resolved: the plan on its model.
        clock: of the state that the run goes on from.
    """

    def __init__(self, resolved: Resolved, clock: int) -> None:
        names = [info.name for cell in resolved.cells for info in cell.parameters]
        self._parameters = hashlib.sha256("\0".join(sorted(names)).encode()).hexdigest()[:16]
        self._about = describe_plan(resolved.plan) | {
            "steps": str(resolved.run.steps),
            "steps per epoch": str(resolved.run.steps_per_epoch),
            "clock": str(clock),
        }
        self._place = ""

    def check(self) -> None:
        """Leave a note for the other processes, and raise if theirs differ.

        Raises:
            PlanError: if another process trains the same parameters by another plan.
        """
        store = _store()
        if store is None:
            return
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if not self._place:
            number = _built[self._parameters] = _built.get(self._parameters, 0) + 1
            self._place = f"lamina/{self._parameters}/{number}"
            store.set(f"{self._place}/{rank}", json.dumps(self._about))
        for other in range(size):
            place = f"{self._place}/{other}"
            if other != rank and store.check([place]):
                compare(self._about, json.loads(store.get(place)), rank, other)


def _store() -> Any:
    """Return the store of the default group; None if there is no group, or torch hides it."""
    if not is_distributed() or torch.distributed.get_world_size() == 1:
        return None
    find = getattr(torch.distributed.distributed_c10d, "_get_default_store", None)
    return None if find is None else find()


def describe_plan(plan: Plan) -> dict[str, str]:
    """Return a plan as text, for comparison: functions count by their names."""
    try:
        text = plan.to_toml()
    except PlanError:  # functions, or an optimizer without a registered name
        text = _ADDRESS.sub("", repr(plan))
    return {"plan": text}


def compare(
    mine: Mapping[str, str],
    theirs: Mapping[str, str],
    rank: int,
    other: int,
    error: type[LaminaError] = PlanError,
) -> None:
    """Raise if two processes that train together were given different things.

    Args:
        mine: what this process was given, by what it is.
        theirs: what the other was given.
        rank: the number of this process.
        other: that of the other.
        error: the kind of error.
    """
    for name, text in mine.items():
        against = theirs.get(name, "")
        if text == against:
            continue
        lines = zip_longest(text.splitlines(), against.splitlines(), fillvalue="")
        here, there = next(((a, b) for a, b in lines if a != b), ("", ""))
        raise error(
            f"process {rank} was given another {name} than process {other}: "
            f"{shortened(here.strip()) or 'no such line'!r} against "
            f"{shortened(there.strip()) or 'no such line'!r}. All processes that train together "
            f"need the same {name}: read it from the same place in each, and compute nothing in "
            "it from the rank."
        )
