"""SIGKILL at points of writing and at random moments: the resumed run ends with the same bits."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import test_kill
from lamina.training.folder_lock import LOCK
from test_resume import assert_same

from .count import Counts, Wrong, empty_folder


def kills(full: bool = True, spoil: Callable[[Path], None] = lambda folder: None) -> list[Counts]:
    """Kill runs, resume them, and compare them with one that was not killed.

    Args:
        full: try many points of each kind.
        spoil: what is done to each resumed folder before it is compared.
    """
    points = Counts("kills while writing", limit=30.0)
    moments = Counts("kills at random moments", limit=30.0)
    with tempfile.TemporaryDirectory() as name, empty_folder():
        writing = chosen(Path(name)) if full else [list(test_kill.MORE[1])]
        resumed(points, Path(name) / "points", writing, spoil)
        if full:
            chance = random.Random(0)
            times = [chance.uniform(0.1, 1.9) for _ in range(20)]
            resumed(moments, Path(name) / "times", times, spoil, RESUME_SLEEP="0.1")
    return [points, moments] if full else [points]


def chosen(folder: Path) -> list[Any]:
    """Draw points from all calls of the functions that write, most of them rare ones."""
    test_kill.drive(folder, [test_kill.job(folder / "counted")])
    calls = json.loads((folder / "counted.calls").read_text())
    chance = random.Random(0)
    points = []
    for name, count in calls.items():
        for number in chance.sample(range(1, count + 1), min(count, 12)):
            points.append([name, number, chance.choice(("before", "after"))])
    return points


def resumed(
    counts: Counts,
    folder: Path,
    points: list[Any],
    spoil: Callable[[Path], None],
    **environment: str,
) -> None:
    folder.mkdir()
    jobs = [test_kill.job(folder / "whole")]
    for number, point in enumerate(points):
        out = folder / f"killed-{number}"
        jobs += [test_kill.job(out, point), test_kill.job(out)]
    statuses = test_kill.drive(folder, jobs, **environment)[1:]
    for number, point in enumerate(points):
        out = folder / f"killed-{number}"
        spoil(out)
        pair = statuses[2 * number : 2 * number + 2]
        counts.attempt(point, lambda out=out, pair=pair: judge(folder / "whole", out, pair))


def judge(whole: Path, out: Path, statuses: list[int]) -> str:
    if statuses != [-9, 0]:
        raise Wrong(f"killed, it ended with {statuses[0]}, and resumed with {statuses[1]}")
    try:
        assert_same(whole, out)
    except AssertionError as error:
        raise Wrong(f"other bits than a run that was not killed: {error}") from error
    left = [path.name for path in out.rglob(".*") if path.name != LOCK]  # removing it is a race
    if left:
        raise Wrong(f"left behind: {left}")
    status = json.loads((out / "run.json").read_text())["status"]
    if status != "finished":
        raise Wrong(f"on record as {status}")
    return "taken"
