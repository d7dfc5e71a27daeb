"""What a rule may say of a setting: a number, a schedule, a function, or a factor on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .._util.grammar import Expression
from .._util.numbers import check_amount, python_number
from ..errors import HyperparameterError, PlanError
from ..schedules import Schedule
from ..schedules import duration as time
from ..schedules.duration import TimeLike


class _Factor(Expression):
    """A factor on what earlier rules gave, which is no number and cannot be multiplied with one."""

    def __mul__(self, other: object) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        raise PlanError(
            f"{self!r} cannot be multiplied with {other!r}: it is a factor on what earlier rules "
            f"gave. Give the plan, or an earlier rule, lr={other!r}, and the rule lr={self!r}."
        )

    __rmul__ = __mul__


@dataclass(frozen=True, repr=False)
class Times(_Factor):
    """A factor on what earlier rules gave: a number, or a schedule that is a factor.

    Formula: `earlier * factor`. In TOML also written `"x0.1"`.

    Args:
        factor: a number of at least 0, or a schedule without an absolute start.

    Example:
        >>> times(0.1)
        times(0.1)
    """

    source_name: ClassVar[str] = "times"
    factor: float | Schedule

    def __post_init__(self) -> None:
        if isinstance(self.factor, Schedule):
            if self.factor.kind == "value":
                raise PlanError(
                    f"times({self.factor!r}): the schedule is a value; expected a factor, "
                    "which has no absolute start."
                )
            return
        object.__setattr__(self, "factor", python_number(self.factor))
        check_amount("times", "factor", self.factor)


@dataclass(frozen=True, repr=False)
class ByDepth(_Factor):
    """Geometric decay by layer: the top layer keeps its value, each lower one has it times rate.

    Formula: `earlier * rate ** (ranks below the top layer)`; the layers are those that the rule's
    pattern captures with `{depth}`. Parameters without a captured layer are unchanged.

    Args:
        rate: the factor from one layer to the next lower one, above 0.

    Example:
        >>> by_depth(0.9)
        by_depth(0.9)

    References:
        Howard and Ruder, ULMFiT (2018), section 3.2, discriminative fine-tuning.
    """

    source_name: ClassVar[str] = "by_depth"
    rate: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", python_number(self.rate))
        check_amount("by_depth", "rate", self.rate)
        if self.rate == 0:
            raise HyperparameterError("by_depth was given rate=0; expected a number above 0.")


@dataclass(frozen=True, repr=False)
class TopDown(Expression):
    """Gradual unfreezing: the top layer thaws at `start`, each next lower one `every` later.

    Formula: a layer of rank r below the top thaws at `start + r * every`, rounded up.

    Args:
        every: the time from one layer to the next, in any unit.
        start: when the top layer thaws; `every` by default.

    Example:
        >>> top_down(every="0.4 epochs")
        top_down('0.4 epochs')

    References:
        Howard and Ruder, ULMFiT (2018), section 3.3, gradual unfreezing.
    """

    source_name: ClassVar[str] = "top_down"
    every: TimeLike
    start: TimeLike | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "every", time.parse(self.every).text)
        if self.start is not None:
            object.__setattr__(self, "start", time.parse(self.start).text)


times = Times
by_depth = ByDepth
top_down = TopDown
