"""What a rule may say of a setting: a number, a schedule, a function, or a factor on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .._util.grammar import Expression
from .._util.numbers import check_amount, is_number, python_number
from ..errors import HyperparameterError, PatternError, PlanError
from ..model.patterns import compile_pattern
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

    Formula: `earlier * max(rate ** (top - place), least)`. The n layers that the rule's pattern
    captures with `{depth}` have the places 0 to n - 1, from the lowest; what `below` selects has
    place -1, what `above` selects has place n. `top` is the highest place: n - 1, or n with
    `above`. So with both, as in BEiT and timm, the head keeps its value, layer i has
    `rate ** (n - i)`, and the embeddings have `rate ** (n + 1)`.

    The rule's pattern need not select what `below` and `above` do; of what it does not select, the
    rule sets nothing else. Parameters without a place are unchanged.

    Args:
        rate: the factor from one layer to the next lower one, above 0.
        below: a pattern for what counts as one layer below the lowest, such as the embeddings.
        above: a pattern for what counts as one layer above the top one, such as the head.
        least: no factor is smaller than this, above 0 and at most 1; None for no such bound.

    Raises:
        HyperparameterError: for a rate or a bound out of its range.
        PatternError: for a pattern that cannot be read, or that captures layer numbers itself.

    Example:
        >>> by_depth(0.9)
        by_depth(0.9)
        >>> by_depth(0.75, below="embeddings.*", above="head.*", least=0.01)
        by_depth(0.75, below='embeddings.*', above='head.*', least=0.01)

    References:
        Howard and Ruder, ULMFiT (2018), section 3.2, discriminative fine-tuning; Bao et al., BEiT
        (2021), appendix H, which counts embeddings and head as layers.
    """

    source_name: ClassVar[str] = "by_depth"
    rate: float
    below: str | None = field(default=None, kw_only=True)
    above: str | None = field(default=None, kw_only=True)
    least: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", python_number(self.rate))
        check_amount("by_depth", "rate", self.rate)
        if self.rate == 0:
            raise HyperparameterError("by_depth was given rate=0; expected a number above 0.")
        for key in ("below", "above"):
            _check_end(key, getattr(self, key))
        object.__setattr__(self, "least", python_number(self.least))
        if self.least is not None and not (is_number(self.least) and 0 < self.least <= 1):
            raise HyperparameterError(
                f"by_depth was given least={self.least!r}; expected a number above 0, at most 1: "
                "the smallest factor of any layer."
            )

    def factor(self, place: int, layers: int) -> float:
        """Return the factor of a place: 0 is the lowest layer, -1 `below` and `layers` `above`."""
        top = layers - 1 if self.above is None else layers
        factor = self.rate ** (top - place)
        return factor if self.least is None else max(factor, self.least)


def _check_end(key: str, pattern: object) -> None:
    """Raise `PatternError` unless this can be the pattern of what lies beside the layers."""
    if pattern is None:
        return
    if not isinstance(pattern, str):
        raise PatternError(
            f"by_depth was given {key}={pattern!r}; expected a pattern such as 'embeddings.*'."
        )
    if '"' in pattern:  # a plan in TOML puts it in such quotes
        raise PatternError(f"by_depth was given {key}={pattern!r}; no name has a quotation mark.")
    if compile_pattern(pattern).captures:
        raise PatternError(
            f"by_depth was given {key}={pattern!r}; it is one layer, so leave out {{depth}}: the "
            "rule's own pattern captures the numbers of the layers."
        )


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
