"""One case: build every candidate, let them race, and see that they computed the same."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import bound
from .candidates import Absent, Built, Candidate, candidates
from .cases import Case
from .measure import Contestant, Timing, race
from .shapes import SHAPES, numbers
from .tensors import Tensors

#: of how far the weights went; candidates round differently, and that adds up
TOLERANCE = 0.05
#: what also runs with another number of groups, where a case asks for that
BESIDE = ("torch fused", "lamina plan", "lamina drop-in")


@dataclass(frozen=True)
class Options:
    """How all cases are run."""

    rounds: int = 25
    kept: bool = False
    device: str = "cpu"
    compiled: bool = True


def beside_name(name: str, groups: int) -> str:
    return f"{name}, {groups} {'group' if groups == 1 else 'groups'}"


def compare(case: Case, options: Options) -> dict[str, Any]:
    """Time all candidates of a case; what cannot run here is named with the reason."""
    shapes = SHAPES[case.shapes]()
    tensors = Tensors(shapes, kept=options.kept, device=options.device)
    built: dict[str, Built] = {}
    first: dict[str, float] = {}
    absent: dict[str, str] = {}
    for name, candidate, groups in _entrants(case, options):
        start = time.perf_counter()
        try:
            built[name] = _begin(candidate, tensors, groups, case.clip)
        except Exception as error:
            if name.startswith("lamina"):
                raise  # a fault of ours is not to be passed over
            absent[name] = _in_short(error)
        else:
            first[name] = 1e3 * (time.perf_counter() - start)
    contestants = {
        name: Contestant(
            each.step,
            before=partial(tensors.give, each.params),
            after=partial(tensors.take, each.params),
            repeat=case.repeat,
        )
        for name, each in built.items()
    }
    if case.bound and options.device == "cpu":
        try:
            contestants[bound.NAME] = bound.bandwidth_bound(shapes, case.algorithm, case.clip)
        except Absent as error:
            absent[bound.NAME] = str(error)
    rounds = min(options.rounds, case.most_rounds or options.rounds)
    times = race(contestants, rounds, warmup=min(3, rounds // 3))
    return {
        "title": case.title,
        "tensors": len(shapes),
        "numbers": numbers(shapes),
        "absent": absent,
        "rows": {
            name: {
                **_row(times[name]),
                "first_ms": _rounded(first[name]) if name in first else None,
                "kernels": built[name].kernels() if name in built else None,
            }
            for name in contestants
        },
        "differs": _differing(case, tensors, built),
    }


def _entrants(case: Case, options: Options) -> Iterator[tuple[str, Candidate, int]]:
    for name, candidate in candidates(case.algorithm).items():
        if "compiled" in name and not (case.compiled and options.compiled):
            continue
        if case.clip and not candidate.clips:
            continue
        yield name, candidate, case.groups
        if case.beside is not None and name in BESIDE:
            yield beside_name(name, case.beside), candidate, case.beside


def _begin(candidate: Candidate, tensors: Tensors, groups: int, clip: bool) -> Built:
    """Build a candidate and take its first step, in which some compile and others fail."""
    built = candidate.build(tensors, groups, clip)
    tensors.give(built.params)
    built.step()
    tensors.take(built.params)
    return built


def _row(timing: Timing) -> dict[str, Any]:
    return {
        "median_ms": _rounded(timing.median),
        "middle_half_ms": [_rounded(value) for value in timing.middle_half],
        "rounds_ms": [_rounded(value) for value in timing.rounds],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _differing(case: Case, tensors: Tensors, built: dict[str, Built]) -> dict[str, float]:
    """Candidates whose weights did not end where those of the first one did."""
    exact = [
        name
        for name, candidate in candidates(case.algorithm).items()
        if candidate.exact and name in built
    ]
    found = {}
    for name in exact[1:]:
        apart = tensors.difference(built[name].params, built[exact[0]].params)
        if not apart <= TOLERANCE:
            found[name] = _rounded(apart)
    return found


def _in_short(error: Exception) -> str:
    if isinstance(error, Absent):
        return str(error)
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line[:200]}"
