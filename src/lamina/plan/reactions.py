"""Feedback from metrics: values that react to `optimizer.report(...)`, as pure functions.

A reaction is a frozen value; what it has seen is a plain dict that `observe` maps to the next
one, so that it is saved with the optimizer and nothing is lost on resume.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from .._util.grammar import Expression
from .._util.numbers import is_number
from ..errors import PlanError
from ..schedules import duration as time
from ..schedules.duration import Run, TimeLike
from .history import extended

#: what a reaction has seen: plain numbers only
Seen = Mapping[str, Any]


@dataclass(frozen=True, repr=False)
class Reaction(Expression, ABC):
    """What all reactions share: the metric they watch and when it counts as better."""

    source_name: ClassVar[str] = ""
    metric: str

    @property
    @abstractmethod
    def patience(self) -> TimeLike:
        """How long it waits: reports, or a time with a unit."""

    @abstractmethod
    def begin(self) -> dict[str, Any]:
        """Return what it has seen before any report."""

    def check(self, mode: str, patience: TimeLike, **numbers: float) -> None:
        """Raise `PlanError` for arguments that cannot be meant."""
        if not (isinstance(self.metric, str) and self.metric.isidentifier()):
            raise PlanError(
                f"{self.source_name} was given the metric {self.metric!r}; expected the name used "
                f"in optimizer.report(...), such as {_as_name(self.metric)!r}."
            )
        if mode not in ("min", "max"):
            raise PlanError(f"{self.source_name} was given mode={mode!r}; expected 'min' or 'max'.")
        time.parse(patience)
        for key, number in numbers.items():
            if not is_number(number) or not 0 <= number < math.inf:
                raise PlanError(
                    f"{self.source_name} was given {key}={number!r}; expected a number of at "
                    "least 0."
                )


def _as_name(metric: object) -> str:
    """Return a metric such as 'val/loss' as a name that an argument can have."""
    name = re.sub(r"\W+", "_", metric).strip("_") if isinstance(metric, str) else ""
    return name if name.isidentifier() else "val_loss"


def key_of(kind: str, reaction: Any) -> str:
    """Return the key of a reaction's memory; another metric has another key.

    Example:
        >>> key_of("early stop", early_stop("accuracy", mode="max"))
        'early stop (accuracy, max)'
    """
    return f"{kind} ({reaction.metric}, {reaction.mode})"


def better(value: float, best: float | None, mode: str, threshold: float) -> bool:
    """Return whether a metric improved by more than a share of the best so far.

    Formula: `value < best - threshold * |best|` for "min"; relative, so that it means the same
    for a loss of 100 and one of 1e-6, and right for negative metrics.
    """
    if math.isinf(value):
        return value < 0 if mode == "min" else value > 0
    if best is None or math.isinf(best):
        return True
    margin = threshold * abs(best)
    return value < best - margin if mode == "min" else value > best + margin


def counted(seen: Seen, improved: bool, value: float, step: int) -> dict[str, Any]:
    """Return what was seen with one more report: a new best, or one more that was not."""
    if improved:
        return {**seen, "best": value, "bad": 0, "since": step}
    return {**seen, "bad": seen["bad"] + 1}


def waited(patience: TimeLike, seen: Seen, step: int, run: Run) -> float:
    """Count how much patience is used up: reports, or time, since the best."""
    if isinstance(patience, int):
        return float(seen["bad"] - patience)
    return float(step - seen["since"] - time.parse(patience).in_steps(run))


@dataclass(frozen=True, repr=False)
class Plateau(Reaction):
    """Lower lr by a factor when a metric stalls; multiplies whatever the schedule gives.

    Formula: after more than `patience` reports without improvement the multiplier becomes
    `max(multiplier * factor, min_factor)`, then `cooldown` reports are not counted.

    Args:
        metric: its name in `optimizer.report(...)`.
        factor: what a stall multiplies lr with, between 0 and 1.
        patience: reports without improvement that are allowed (torch's meaning), or a time
            since the best, such as `"3 epochs"`.
        threshold: the relative improvement that counts.
        cooldown: reports after a reduction that are not counted.
        min_factor: the lowest multiplier; relative, so that the tiniest lr is reduced too.
        mode: `"min"` if smaller is better, `"max"` if larger.

    Example:
        >>> plateau("val_loss", factor=0.5, patience=2)
        plateau('val_loss', factor=0.5, patience=2)
    """

    source_name: ClassVar[str] = "plateau"
    _: KW_ONLY
    factor: float = 0.1
    patience: TimeLike = 10
    threshold: float = 1e-4
    cooldown: int = 0
    min_factor: float = 0.0
    mode: str = "min"

    def __post_init__(self) -> None:
        self.check(
            self.mode,
            self.patience,
            factor=self.factor,
            threshold=self.threshold,
            cooldown=self.cooldown,
            min_factor=self.min_factor,
        )
        if not self.factor < 1:
            raise PlanError(f"plateau was given factor={self.factor!r}; expected less than 1.")
        if not isinstance(self.cooldown, int):
            raise PlanError(
                f"plateau was given cooldown={self.cooldown!r}; expected a whole number of reports."
            )

    def begin(self) -> dict[str, Any]:
        """Return what it has seen before any report; `changes` lists [step, multiplier]."""
        return {"best": None, "bad": 0, "since": 0, "cooldown": 0, "changes": []}

    def observe(self, seen: Seen, value: float, step: int, run: Run) -> dict[str, Any]:
        """Return what it has seen after a report at a step."""
        improved = better(value, seen["best"], self.mode, self.threshold)
        new = counted(seen, improved, value, step)
        if seen["cooldown"] > 0:
            new.update(cooldown=seen["cooldown"] - 1, bad=0, since=step)
        if waited(self.patience, new, step, run) > 0:
            now = seen["changes"][-1][1] if seen["changes"] else 1.0
            lower = max(now * self.factor, self.min_factor)
            new.update(bad=0, since=step, cooldown=self.cooldown)
            if lower < now:
                new["changes"] = extended(seen["changes"], step, lower)
        return new


@dataclass(frozen=True, repr=False)
class EarlyStop(Reaction):
    """Set `optimizer.should_stop` when a metric no longer improves.

    While a thaw is still to come, and when a part has just thawed or a plateau has just lowered lr,
    patience starts again: the change deserves its chance. Of several reductions without an
    improvement between them only the first does so, or the run would never stop.

    Args:
        metric: its name in `optimizer.report(...)`.
        patience: reports without improvement after which to stop, or a time since the best.
        min_delta: the absolute improvement that counts.
        mode: `"min"` if smaller is better, `"max"` if larger.

    Example:
        >>> early_stop("val_loss", patience=3)
        early_stop('val_loss', patience=3)
    """

    source_name: ClassVar[str] = "early_stop"
    _: KW_ONLY
    patience: TimeLike = 3
    min_delta: float = 0.0
    mode: str = "min"

    def __post_init__(self) -> None:
        self.check(self.mode, self.patience, min_delta=self.min_delta)
        if self.patience == 0:
            raise PlanError("early_stop was given patience=0; expected 1 report or more.")

    def begin(self) -> dict[str, Any]:
        """Return what it has seen before any report."""
        return {"best": None, "bad": 0, "since": 0, "stop": False, "opened": 0, "waited": False}

    def observe(
        self, seen: Seen, value: float, step: int, run: Run, thaw: bool, lowered: bool
    ) -> dict[str, Any]:
        """Return what it has seen after a report.

        `thaw`: a part has just thawed or will; `lowered`: a plateau has just lowered lr; `waited`
        remembers that a reduction had its chance since the best.
        """
        worst = math.inf if self.mode == "min" else -math.inf
        reference = worst if seen["best"] is None else seen["best"]
        gain = reference - value if self.mode == "min" else value - reference
        improved = gain > self.min_delta
        new = counted(seen, improved, value, step)
        if improved:
            new["waited"] = False
        if thaw or (lowered and not new["waited"]):
            new.update(bad=0, since=step, waited=new["waited"] or lowered)
        new["stop"] = seen["stop"] or waited(self.patience, new, step, run) >= 0
        return new


@dataclass(frozen=True, repr=False)
class OnPlateau(Reaction):
    """A thaw that begins when a metric stalls: `thaw=on_plateau("val_loss", patience=2)`.

    The part trains from the step after the next one.

    Args:
        metric: its name in `optimizer.report(...)`.
        patience: reports without improvement that are allowed, or a time since the best.
        threshold: the relative improvement that counts.
        mode: `"min"` if smaller is better, `"max"` if larger.

    Example:
        >>> on_plateau("val_loss", patience=2)
        on_plateau('val_loss', patience=2)
    """

    source_name: ClassVar[str] = "on_plateau"
    _: KW_ONLY
    patience: TimeLike = 10
    threshold: float = 1e-4
    mode: str = "min"

    def __post_init__(self) -> None:
        self.check(self.mode, self.patience, threshold=self.threshold)

    def begin(self) -> dict[str, Any]:
        """Return what it has seen before any report; `opened` is the step of the thaw."""
        return {"best": None, "bad": 0, "since": 0, "opened": None}

    def observe(self, seen: Seen, value: float, step: int, run: Run) -> dict[str, Any]:
        """Return what it has seen after a report at a step."""
        if seen["opened"] is not None:
            return dict(seen)
        improved = better(value, seen["best"], self.mode, self.threshold)
        new = counted(seen, improved, value, step)
        if waited(self.patience, new, step, run) > 0:
            new["opened"] = step + 1
        return new


plateau = Plateau
early_stop = EarlyStop
on_plateau = OnPlateau
REACTIONS = {"plateau": plateau, "early_stop": early_stop, "on_plateau": on_plateau}
