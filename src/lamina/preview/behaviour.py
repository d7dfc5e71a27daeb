"""What the parameters of each group do at each step, in a form that can be compared and hashed.

Values count only where a group trains, so that what a frozen group would have done is no
difference. Numbers are compared on a grid of 2^-24 of the group's largest one, which is what
32-bit arithmetic keeps of it: machines do not agree about the last bits of a cosine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .._util.grammar import to_source
from ..algorithms.registry import OPTIMIZERS, optimizer_name
from ..gradients.operations import AGC, ClipParamNorm, ClipValue, Operation, ScaleGradients
from ..resolve.resolved import Cell, Trigger
from ..resolve.timeline import Values, values_at
from ..schedules.base import steps_to_check
from .sampling import windows
from .shown import Shown

Floats = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64]
#: of a run of unknown length, so many steps are looked at
HORIZON = 1000
BITS = 24
#: operations that are the same for a parameter whoever shares its scope
_SEPARATE = (AGC, ClipParamNorm, ClipValue, ScaleGradients)


@dataclass(frozen=True, eq=False)
class Behaviour:
    """What the parameters of one group do at each of some steps.

    `active` tells at which steps they train; `numbers` are hyperparameters and thresholds over the
    steps, a float where one does not move; `words` is all that is no number.
    """

    active: npt.NDArray[np.bool_]
    numbers: Mapping[str, Floats | float]
    words: Mapping[str, str]


def steps_of(steps: int | None) -> Steps:
    """Return the steps of a run at which behaviour is compared: all, of very long runs a part."""
    return steps_to_check(HORIZON if steps is None else steps).astype(np.int64)


class Behaviours:
    """What each group of a preview does at some steps; `of` works it out for one group.

    It is not kept: over a long run it is large.

    Args:
        preview: the preview.
        steps: the steps.
    """

    def __init__(self, preview: Shown, steps: Steps) -> None:
        self._preview = preview
        self._steps = steps
        self._values = preview.values(steps)
        self._members = _members(preview)

    def of(self, index: int) -> Behaviour:
        """Return what the group of this index does."""
        return _behaviour(self._preview, self._values, self._steps, index, self._members)


def _members(preview: Shown) -> dict[int, list[str]]:
    """Return the names of the parameters of each gradient scope, of those that may train."""
    found: dict[int, list[str]] = {}
    for cell in preview.resolved.cells:
        if cell.scope is not None and cell.windows:
            names = found.setdefault(cell.scope, [])
            names += [min(info.names) for info in cell.parameters]
    return found


def _behaviour(
    preview: Shown, values: Values, steps: Steps, index: int, members: Mapping[int, list[str]]
) -> Behaviour:
    cell = preview.resolved.cells[index]
    active = np.broadcast_to(values.active(index), steps.shape)
    words: dict[str, str] = {}
    waiting = [begin for begin, _ in cell.windows if isinstance(begin, Trigger)]
    if waiting:
        words["thaw"] = ", ".join(repr(trigger.reaction) for trigger in waiting)
        words["rewarm"] = _lasting(to_source(cell.rewarm))
        values = _as_if_opened(preview, waiting, steps)
    if not active.all():
        words["hold"] = str(cell.hold)
    if not (active.any() or waiting):
        return Behaviour(active, {}, words)
    if any(end is not None for _, end in windows(preview, cell)):
        words["frozen_state"] = cell.frozen_state
    words["optimizer"] = _identity(cell.optimizer)
    if cell.feedback is not None:
        words["feedback"] = repr(dict(preview.resolved.reactions)[cell.feedback])
    numbers: dict[str, Floats | float] = {}
    for key, value in values.hyper(index).items():
        _sort_in(key, value, numbers, words)
    _drop_idle(words, cell)
    if cell.scope is not None:
        operations = values.operations(cell.scope)
        words["gradients"] = _gradients(operations, members.get(cell.scope, []))
        for place, (operation, amount) in enumerate(operations):
            _sort_in(f"{operation.source_name} ({place + 1})", amount, numbers, words)
    return Behaviour(active, numbers, words)


#: what holds for settings of which a behaviour has no word
UNSAID = {"rounding": "nearest", "state_dtype": "that of the parameter"}


def _drop_idle(words: dict[str, str], cell: Cell) -> None:
    """Leave out settings that are the default, and a rounding where nothing has 16 bits."""
    if not any(info.dtype in ("bfloat16", "float16") for info in cell.parameters):
        words.pop("rounding", None)
    for key in UNSAID:
        if words.get(key) in ("None", UNSAID[key]):
            del words[key]


def _as_if_opened(preview: Shown, waiting: list[Trigger], steps: Steps) -> Values:
    """Return the values of groups that wait for a metric as if they had begun to train."""
    seen = {**preview.feedback.seen}
    for trigger in waiting:
        seen[trigger.key] = {**seen.get(trigger.key, {}), "opened": 0}
    return values_at(preview.resolved, steps, replace(preview.feedback, seen=seen))


def _identity(optimizer: type) -> str:
    """Return what an optimizer is called in any process; of others with their package."""
    name = optimizer_name(optimizer)
    package = optimizer.__module__.partition(".")[0]
    registered = OPTIMIZERS.get(name) is optimizer
    return name if registered or package == "lamina" else f"{package}.{name}"


def _gradients(operations: list[tuple[Operation, Any]], together: Sequence[str]) -> str:
    """Return the operations of a scope without their numbers, and over which parameters."""
    texts = ", ".join(_form(operation) for operation, _ in operations) or "nothing"
    if all(isinstance(operation, _SEPARATE) for operation, _ in operations):
        return texts
    # The first name stands for all: no two scopes of a plan have a parameter in common.
    if len(together) == 1:
        return f"{texts} of {together[0]} alone"
    return f"{texts} over {len(together)} parameters with {min(together)}"


def _form(operation: Operation) -> str:
    """Return an operation without its number, which moves: `clip_norm`, `clip_norm(p=1.0)`."""
    if repr(operation) == f"{operation.source_name}({operation.amount!r})":
        return operation.source_name
    known: Any = operation  # the base class alone is no dataclass
    one = repr(replace(known, amount=1.0))
    return _lasting(one.replace("(1.0, ", "("))


def _lasting(text: str) -> str:
    """Return a text without the addresses in memory that Python prints for functions."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _sort_in(
    key: str, value: Any, numbers: dict[str, Floats | float], words: dict[str, str]
) -> None:
    """Put a value, or each part of one, with the numbers or with the words."""
    if isinstance(value, tuple):
        for place, part in enumerate(value):
            _sort_in(f"{key}[{place}]", part, numbers, words)
    elif isinstance(value, np.ndarray):
        numbers[key] = value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        numbers[key] = float(value)
    else:
        words[key] = _lasting(str(value))


def grid_exponent(largest: float) -> int:
    """Return the power of 2 of the grid for numbers up to this one."""
    # A little more, so that a number just below a power of 2 by rounding has that power's grid.
    return math.frexp(largest * (1 + 1e-9))[1] - BITS
