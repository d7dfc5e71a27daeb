"""What a plan means for one model: frozen data without tensors, made by `resolve`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from ..algorithms.base import Algorithm
from ..gradients.operations import Operation
from ..model.finding import Finding
from ..model.parameters import ParamInfo
from ..plan.plan import Plan
from ..plan.reactions import OnPlateau, Reaction
from ..schedules import Schedule
from ..schedules.duration import Run


@dataclass(frozen=True)
class Trigger:
    """A thaw that waits for a metric; `key` finds what it has seen."""

    key: str
    reaction: OnPlateau


#: spans of steps in which a parameter trains: [begin, end), end None for never
Windows = tuple[tuple[int | Trigger, int | None], ...]
ALWAYS: Windows = ((0, None),)
NEVER: Windows = ()


@dataclass(frozen=True)
class Setting:
    """One number over time: `scale * product of curves`; options keep their object as scale."""

    scale: Any
    curves: tuple[Schedule, ...] = ()


def each_part(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return what `change` makes of a value, or of every part of a tuple (`betas`)."""
    return tuple(map(change, value)) if isinstance(value, tuple) else change(value)


class Origin(NamedTuple):
    """What one rule said of one setting of one parameter, and what came of it.

    The objects are kept, and put into words only when `explain` asks: a model has thousands.
    """

    rule: str
    value: object
    result: object


class WindowOrigin(NamedTuple):
    """What one rule said of when a parameter trains; `given` are its settings."""

    rule: str
    given: tuple[tuple[str, object], ...]
    windows: Windows
    #: the dtype, if it has no gradients
    dtype: str = ""


@dataclass(frozen=True)
class Scope:
    """The parameters whose gradients one rule operates on together.

    `operations` in order, each with its number over time.
    """

    rule: int
    name: str
    operations: tuple[tuple[Operation, Setting], ...]


@dataclass(frozen=True)
class Cell:
    """Parameters with equal settings: one parameter group.

    `schedule` and `rewarm` are factors on lr, `feedback` is the key of one more (a plateau);
    `hold` keeps wholly frozen modules in eval mode; `frozen_state` ("keep" or "drop") is what
    becomes of the optimizer's state when a window closes; `scope` is an index into
    `Resolved.scopes`; `by_model` says that the model's owner froze it before the plan
    (`requires_grad=False`) and that no rule says anything about it.
    """

    name: str
    optimizer: type
    algorithm: Algorithm | None
    hyper: tuple[tuple[str, Setting | tuple[Setting, ...]], ...]
    schedule: Schedule | None
    rewarm: Schedule | None
    feedback: str | None
    windows: Windows
    hold: bool
    frozen_state: str
    scope: int | None
    rules: tuple[str, ...]
    parameters: tuple[ParamInfo, ...] = field(repr=False)
    by_model: bool = False

    @cached_property
    def constants(self) -> dict[str, Any]:
        """The hyperparameters that never change; those that move stand in it with their scale."""
        return {key: each_part(setting, lambda part: part.scale) for key, setting in self.hyper}

    @cached_property
    def moving(self) -> tuple[tuple[str, Setting | tuple[Setting, ...]], ...]:
        """Hyperparameters with a curve of their own."""
        return tuple(
            (key, setting)
            for key, setting in self.hyper
            if any(part.curves for part in (setting if isinstance(setting, tuple) else (setting,)))
        )

    @cached_property
    def steady(self) -> bool:
        """Whether its values are the same at every step, unless they are overridden."""
        factors = (self.schedule, self.feedback, self.rewarm)
        return self.windows == ALWAYS and not self.moving and factors == (None, None, None)

    @property
    def numel(self) -> int:
        """How many numbers train in this cell."""
        return sum(info.numel for info in self.parameters)


@dataclass(frozen=True)
class Resolved:
    """A plan settled for one model and one run; every parameter is in exactly one cell.

    `reactions` are what watches metrics, each with the key of what it has seen;
    `chains[name][setting]` remembers where each value came from. `planned` is the run that the
    schedules were settled for, where that is not `run` (one that was made longer or shorter).
    """

    plan: Plan
    run: Run
    cells: tuple[Cell, ...]
    scopes: tuple[Scope, ...]
    reactions: tuple[tuple[str, Reaction], ...]
    findings: tuple[Finding, ...]
    chains: Mapping[str, Mapping[str, Sequence[Origin | WindowOrigin]]] = field(repr=False)
    planned: Run | None = None

    @property
    def settled_for(self) -> Run:
        """The run whose length the schedules, windows and patiences fit."""
        return self.planned or self.run

    @cached_property
    def moving(self) -> tuple[int, ...]:
        """The cells whose values or windows are not the same at all steps."""
        return tuple(index for index, cell in enumerate(self.cells) if not cell.steady)

    @cached_property
    def scope_of(self) -> dict[str, int | None]:
        """The index of the gradient scope of each cell, by its name; None if it has none."""
        return {cell.name: cell.scope for cell in self.cells}

    @cached_property
    def cell_of(self) -> dict[str, int]:
        """The index of the cell of each name (all names of tied parameters)."""
        return {
            name: index
            for index, cell in enumerate(self.cells)
            for info in cell.parameters
            for name in info.names
        }

    @cached_property
    def info_of(self) -> dict[str, ParamInfo]:
        """The parameter of each name (all names of tied parameters)."""
        return {
            name: info for cell in self.cells for info in cell.parameters for name in info.names
        }
