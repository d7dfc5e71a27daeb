"""A hash of what each parameter does at each step, for tests of a recipe."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..plan.toml import policy
from ..resolve.resolved import Cell, Setting
from .behaviour import BITS, Behaviour, Behaviours, Floats, grid_exponent, steps_of
from .sampling import lr_key, windows
from .shown import Shown


@dataclass(frozen=True)
class _Shape:
    """A number over the steps where its group trains: its largest size, and the rest as a part.

    `hash` is of every value as a part of the largest; None if it never moves.
    """

    largest: float
    hash: str | None


def digest(preview: Shown) -> str:
    """Return the hash of a preview; see `Preview.hash`."""
    resolved, total = preview.resolved, preview.run.steps
    steps = steps_of(total)
    found = Behaviours(preview, steps)
    known: dict[Any, tuple[float, _Shape]] = {}
    parameters = []
    for index, cell in enumerate(resolved.cells):
        behaviour = found.of(index)
        shapes = {
            key: _scaled_shape(preview, cell, behaviour, known)
            if key == "lr"
            else _shape(value, behaviour.active)
            for key, value in behaviour.numbers.items()
        }
        # The steps of a very long run are a sample, in which the edges of windows may be missing.
        spans = windows(preview, cell) if len(steps) != total else []
        edges = _edges(behaviour.active)
        numbers = {key: _written(shape) for key, shape in shapes.items()}
        of_cell = _sha([edges, spans, numbers, dict(behaviour.words)])
        parameters += [(sorted(info.names), of_cell) for info in cell.parameters]
    whole = {key: repr(value) for key, value in policy(resolved.plan).items()}
    return _sha([total, whole, sorted(parameters)])


def _edges(active: npt.NDArray[np.bool_]) -> list[int]:
    """Return the places at which a group begins or ceases to train."""
    if active.all():
        return [0]
    found: list[int] = np.flatnonzero(np.diff(active.astype(np.int8), prepend=0)).tolist()
    return found


def _scaled_shape(
    preview: Shown, cell: Cell, behaviour: Behaviour, known: dict[Any, tuple[float, _Shape]]
) -> _Shape:
    """Return the shape of an lr; groups whose lr differs by a factor are worked out once."""
    lr = dict(cell.hyper)["lr"]
    assert isinstance(lr, Setting)
    _, *others = lr_key(preview, cell)
    scale = float(lr.scale)
    kind = (replace(lr, scale=1.0), *others)
    if scale == 0 or cell.name in preview.feedback.overrides:
        return _shape(behaviour.numbers["lr"], behaviour.active)
    if kind not in known:
        known[kind] = scale, _shape(behaviour.numbers["lr"], behaviour.active)
    its_scale, shape = known[kind]
    return replace(shape, largest=shape.largest * (scale / its_scale))


def _shape(value: Floats | float, active: npt.NDArray[np.bool_]) -> _Shape:
    if not isinstance(value, np.ndarray):
        return _Shape(value, None)
    masked = bool(active.any() and not active.all())  # one that waits for a metric never trains yet
    trained = value[active] if masked else value
    low, high = float(trained.min()), float(trained.max())
    largest = high if abs(high) >= abs(low) else low
    if largest == 0 or high - low <= abs(largest) * 2.0**-BITS / 2:
        return _Shape(largest, None)
    counted = np.where(active, value, 0.0) if masked else value
    parts = np.rint(counted * (2.0**BITS / largest)).astype("<i4")
    return _Shape(largest, hashlib.sha256(parts.tobytes()).hexdigest())


def _written(shape: _Shape) -> list[Any]:
    """Return a shape as text and integers that every machine writes alike."""
    if shape.largest == 0 or not math.isfinite(shape.largest):
        return [str(shape.largest), shape.hash]
    exponent = grid_exponent(abs(shape.largest))
    return [round(math.ldexp(shape.largest, -exponent)), exponent, shape.hash]


def _sha(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
