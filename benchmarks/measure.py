"""Interleaved timing: every candidate once in each round, in an order that changes."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Action = Callable[[], object]


def nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate, round by round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def middle_half(self) -> tuple[float, float]:
        """The quartiles, between which half of the rounds lie."""
        ordered = sorted(self.rounds)
        quarter = len(ordered) // 4
        return ordered[quarter], ordered[-1 - quarter]

    def ratio(self, other: Timing) -> float:
        """How long against another: the median of the ratios within each round."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


@dataclass(frozen=True)
class Contestant:
    """What is timed, and what happens before and after it while no clock runs.

    `repeat` steps in a row, each with its own preparation, make up one time: their median. The
    first of them pays for what the other contestants have left in the caches and in the allocator.
    """

    step: Action
    before: Action = nothing
    after: Action = nothing
    repeat: int = 1

    def time_once(self) -> float:
        """Milliseconds of one step."""
        spent = []
        for _ in range(self.repeat):
            self.before()
            _wait()
            start = time.perf_counter()
            self.step()
            _wait()
            spent.append(time.perf_counter() - start)
            self.after()
        return 1e3 * statistics.median(spent)


def race(contestants: Mapping[str, Contestant], rounds: int, warmup: int = 3) -> dict[str, Timing]:
    """Time every contestant once in each round.

    What else happens on the machine then falls on all of them alike.
    """
    order = random.Random(0)
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-warmup, rounds):
        order.shuffle(names)
        for name in names:
            spent = contestants[name].time_once()
            if round_ >= 0:
                times[name].append(spent)
    return {name: Timing(tuple(values)) for name, values in times.items()}


def interleave(
    candidates: Mapping[str, Callable[[], None]],
    before: Callable[[], None],
    rounds: int,
    warmup: int = 3,
) -> dict[str, Timing]:
    """Time every candidate once in each round; `before` runs ahead of each, untimed."""
    contestants = {name: Contestant(step, before) for name, step in candidates.items()}
    return race(contestants, rounds, warmup)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
