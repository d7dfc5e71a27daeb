"""Any function of the step, and schedules of one's own by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, ClassVar

import numpy as np

from .._util.grammar import to_source
from ..errors import ScheduleError
from .base import EITHER, Floats, Schedule
from .duration import TimeLike
from .shape import Shape

#: constructors by the name under which plans call them
SCHEDULES: dict[str, Callable[..., Schedule]] = {}


@dataclass(frozen=True, repr=False)
class Computed(Shape):
    """A schedule whose formula is a Python function of the step."""

    needs_length: ClassVar[bool] = False
    f: Callable[[Any], Any]
    length: TimeLike | None = None

    def __post_init__(self) -> None:
        if not callable(self.f):
            raise ScheduleError(
                f"from_function was given {self.f!r}; expected a function of the step."
            )
        super().__post_init__()

    @property
    def kind(self) -> str:
        return EITHER

    def shape(self, t: Floats, length: float) -> Floats:
        if _takes_arrays(self.f):
            return np.asarray(self.f(t), dtype=np.float64)
        return np.array([self._number(int(step)) for step in t], dtype=np.float64)

    def _number(self, step: int) -> float:
        try:
            return float(self.f(step))
        except Exception as error:
            raise ScheduleError(
                f"{self!r} failed at step {step}: {type(error).__name__}: {error}."
            ) from error


@dataclass(frozen=True, repr=False)
class FromFunction(Computed):
    """Any function of the step, as a factor or as a value, depending on where it stands.

    Formula: `f(t)`, with t counted from the first step of this phase.

    Args:
        f: takes a step and gives a number; tried on an array of steps, else called step by step.
        length: how long, in any unit of time; the rest of the run by default.

    Example:
        >>> from_function(lambda t: 0.95**t)(0)
        1.0
    """

    source_name: ClassVar[str] = "from_function"

    def source_text(self, quote: bool) -> str:
        name = getattr(self.f, "__qualname__", repr(self.f))
        return f"from_function({name}{'' if self.length is None else f', length={self.length!r}'})"


@lru_cache(maxsize=256)
def _takes_arrays(f: Callable[[Any], Any]) -> bool:
    """Return whether f maps arrays element by element; probed on two steps, the same each time."""
    probe = np.array([0.0, 1.0])
    try:
        with np.errstate(all="ignore"):
            got = np.asarray(f(probe), dtype=np.float64)
        return got.shape == (2,) and bool(
            np.allclose(got, [f(0), f(1)], rtol=1e-9, atol=0, equal_nan=True)
        )
    except Exception:  # whatever it raises, it does not take arrays
        return False


@dataclass(frozen=True, repr=False)
class Registered(Computed):
    """A function of the step with a name, under which TOML can hold it."""

    name: str = field(default="", kw_only=True)

    def source_text(self, quote: bool) -> str:
        length = "" if self.length is None else f"length={to_source(self.length, quote)}"
        return f"{self.name}({length})"


def register_schedule(name: str, schedule: Any) -> Callable[..., Schedule]:
    """Let plans, TOML included, call a schedule of one's own by name.

    Args:
        name: the name plans will write: letters, digits and underscores.
        schedule: a subclass of `Shape` (or of `Schedule`), or a function of the step.

    Returns:
        The constructor: the class, or for a function a callable that takes `length=`.

    Raises:
        ScheduleError: for anything else, or for a name that is taken.

    Example:
        >>> halve = register_schedule("halve", lambda step: 0.5 ** (step // 100))
        >>> halve(), halve()(100)
        (halve(), 0.5)
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", name) or name in ("true", "false", "none", "x"):
        raise ScheduleError(
            f"a schedule cannot be registered as {name!r}; expected a name of letters, digits and "
            "underscores."
        )
    made: Callable[..., Schedule]
    if isinstance(schedule, type):
        if not issubclass(schedule, Schedule):
            raise ScheduleError(
                f"{schedule!r} is not a schedule; expected a subclass of Shape, or a function."
            )
        made = schedule
    elif isinstance(schedule, Schedule) or not callable(schedule):
        raise ScheduleError(
            f"register_schedule({name!r}, ...) was given {schedule!r}; expected a subclass of "
            "Shape, or a function of the step."
        )
    else:
        made = partial(Registered, schedule, name=name)
    if name in SCHEDULES and not _same(SCHEDULES[name], made):
        raise ScheduleError(f"the name {name!r} is taken by another schedule; choose another.")
    if isinstance(made, type):
        made.source_name = name
    SCHEDULES[name] = made
    return made


def _same(known: object, given: object) -> bool:
    if isinstance(known, partial) and isinstance(given, partial):
        return known.args == given.args
    return known is given
