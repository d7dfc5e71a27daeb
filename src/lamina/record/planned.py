"""What a run was meant to do, as data: the curves of a plan and the parameters of its groups."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import StateError, shortened
from ..files.atomic import atomic, wrap_read_errors
from ..model.finding import Finding
from .series import Floats, Steps

FORMAT = 1
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ParameterEntry:
    """One parameter of a model: its name, shape, group (None if none) and whether it trains."""

    name: str
    shape: tuple[int, ...]
    group: str | None
    trains: bool = True

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return int(np.prod(self.shape, dtype=object)) if self.shape else 1


@dataclass(frozen=True, eq=False)
class PlannedGroup:
    """One parameter group over a run: lr and whether it trains at the steps of the whole."""

    name: str
    optimizer: str
    thaw: str
    gradients: str
    lr: Floats
    active: Bools


@dataclass(frozen=True, eq=False)
class Planned:
    """What a plan means for a model and a run; made by `Preview.planned`.

    `header` are the lines above a preview's table; `steps` those at which the groups are sampled;
    `total` the length of the run, None if it is unknown.
    """

    header: tuple[str, ...]
    total: int | None
    steps_per_epoch: int | None
    steps: Steps
    groups: tuple[PlannedGroup, ...]
    parameters: tuple[ParameterEntry, ...]
    findings: tuple[Finding, ...]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; the file appears whole or not at all.

        Raises:
            LaminaError: if it cannot be written.
        """
        text = json.dumps(_as_json(self), allow_nan=False, ensure_ascii=False)
        with atomic(Path(path)) as file:
            file.write(text.encode("utf-8", "backslashreplace"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Planned:
        """Read what `save` wrote; the file is data and is parsed as such.

        Raises:
            StateError: if the file cannot be read, or holds something else.
        """
        path = Path(path)
        try:
            with wrap_read_errors(path):
                content = json.loads(path.read_bytes())
            return _from_json(content)
        except StateError:
            raise
        except (
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            OverflowError,
            RecursionError,
        ) as error:
            raise StateError(
                f"{path}: this is no saved plan of a run ({shortened(str(error))}). Remove it: a "
                "report then shows what was recorded alone."
            ) from error


def _as_json(planned: Planned) -> dict[str, Any]:
    curves: dict[bytes, int] = {}  # groups with the same lr at every step share one
    listed: list[list[float]] = []
    groups = []
    for group in planned.groups:
        place = curves.setdefault(group.lr.tobytes(), len(curves))
        if place == len(listed):
            listed.append([float(f"{value:.7g}") for value in group.lr.tolist()])
        edges = np.flatnonzero(np.diff(group.active.astype(np.int8), prepend=0))
        words = {"optimizer": group.optimizer, "thaw": group.thaw, "gradients": group.gradients}
        groups.append({"name": group.name, **words, "lr": place, "turns": edges.tolist()})
    return {
        "format": FORMAT,
        "header": list(planned.header),
        "total": planned.total,
        "steps_per_epoch": planned.steps_per_epoch,
        "steps": planned.steps.tolist(),
        "curves": listed,
        "groups": groups,
        "parameters": [[p.name, list(p.shape), p.group, p.trains] for p in planned.parameters],
        "findings": [[f.code, f.message, f.fix] for f in planned.findings],
    }


def _from_json(content: Any) -> Planned:
    _check(content, dict)
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']!r}")
    steps = np.array([_check(step, int) for step in content["steps"]], np.int64)
    curves = [np.array(curve, np.float64) for curve in content["curves"]]
    if any(curve.shape != steps.shape for curve in curves):
        raise ValueError("a curve has another number of steps")
    return Planned(
        header=tuple(_check(line, str) for line in content["header"]),
        total=_check_optional(content["total"], int),
        steps_per_epoch=_check_optional(content["steps_per_epoch"], int),
        steps=steps,
        groups=tuple(_group(row, curves, len(steps)) for row in content["groups"]),
        parameters=tuple(_parameter(*row) for row in content["parameters"]),
        findings=tuple(
            Finding(*(_check(part, str) for part in (code, message, fix)))
            for code, message, fix in content["findings"]
        ),
    )


def _group(row: Mapping[str, Any], curves: list[Floats], count: int) -> PlannedGroup:
    active = np.zeros(count, np.int8)
    for turn in row["turns"]:
        active[_check(turn, int) :] ^= 1
    return PlannedGroup(
        name=_check(row["name"], str),
        optimizer=_check(row["optimizer"], str),
        thaw=_check(row["thaw"], str),
        gradients=_check(row["gradients"], str),
        lr=curves[_check(row["lr"], int)],
        active=active.astype(bool),
    )


def _parameter(name: Any, shape: Any, group: Any, trains: Any) -> ParameterEntry:
    sizes = tuple(_check(size, int) for size in shape)
    return ParameterEntry(
        _check(name, str), sizes, _check_optional(group, str), _check(trains, bool)
    )


def _check(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{shortened(repr(value), 60)} is no {kind.__name__}")
    return value


def _check_optional(value: Any, kind: type) -> Any:
    return None if value is None else _check(value, kind)
