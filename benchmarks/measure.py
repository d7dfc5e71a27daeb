"""Interleaved timing: every candidate once in each round, in an order that changes."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate, round by round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def ratio(self, other: Timing) -> float:
        """How long against another: the median of the ratios within each round."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def interleave(
    candidates: Mapping[str, Callable[[], None]],
    before: Callable[[], None],
    rounds: int,
    warmup: int = 3,
) -> dict[str, Timing]:
    """Time every candidate once in each round; `before` runs ahead of each, untimed.

    What else happens on the machine then falls on all of them alike.
    """
    order = random.Random(0)
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-warmup, rounds):
        order.shuffle(names)
        for name in names:
            before()
            _wait()
            start = time.perf_counter()
            candidates[name]()
            _wait()
            if round_ >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: Timing(tuple(values)) for name, values in times.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
