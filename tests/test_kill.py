"""A run that is killed at any moment goes on from its last save, and ends with the same bits."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kill_driver
import resume_task
from lamina import checkpoint
from lamina.training.folder_lock import LOCK
from test_resume import assert_same

#: a point of each kind: within a file, before it is durable, before and after it has its name,
#: before the best is marked, and before an old one goes; three of them in every run of the tests
FEW = [
    ("write", 130, "before"),
    ("replace", 5, "after"),
    ("unlink", 2, "before"),
]
MORE = [
    ("fsync", 14, "before"),
    ("replace", 5, "before"),
    ("link", 1, "before"),
]


def drive(folder, jobs, **environment):
    """The exit status of each job."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    seen = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, kill_driver.__file__, str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": seen, **environment},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    # Python's own thread that hands tensors from workers may find one of them gone, and says so.
    told = done.stderr.split("Traceback (most recent call last)")[1:]
    assert [text for text in told if "resource_sharer.py" not in text] == []
    return json.loads(path.with_suffix(".statuses").read_text())


def job(out, kill=None, **settings):
    return {"out": str(out), "kill": kill, "settings": settings}


def check_points(folder, points, **environment):
    """Each point in a run of its own, which is then resumed to its end."""
    jobs = [job(folder / "whole")]
    for number, point in enumerate(points):
        out = folder / f"killed-{number}"
        jobs += [job(out, point), job(out)]
    statuses = drive(folder, jobs, **environment)
    assert statuses[0] == 0
    killed, ended = statuses[1::2], statuses[2::2]
    assert [p for p, status in zip(points, killed, strict=True) if status != -9] == []
    assert [p for p, status in zip(points, ended, strict=True) if status != 0] == []
    for number, point in enumerate(points):
        out = folder / f"killed-{number}"
        assert_same(folder / "whole", out)
        # The file of the lock stays: to take it away would let two processes in.
        left = [path.name for path in out.rglob(".*") if path != out / LOCK]
        assert left == [], point
        assert json.loads((out / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("points", [FEW, pytest.param(MORE, marks=pytest.mark.slow)])
def test_killed_while_writing(tmp_path, points):
    check_points(tmp_path, [list(point) for point in points])


@pytest.mark.slow
def test_killed_at_every_write(tmp_path):
    assert drive(tmp_path, [job(tmp_path / "counted")]) == [0]
    calls = json.loads((tmp_path / "counted.calls").read_text())
    points = [
        [name, number, when]
        for name, count in calls.items()
        for number in range(1, count + 1, 7 if name == "write" else 1)
        for when in ("before", "after")
    ]
    # Of the second save every write: about 150 make one, and after one is before the next.
    points += [["write", number, "before"] for number in range(150, 310) if number % 7 != 1]
    assert {point[0] for point in points} == {"write", "fsync", "replace", "link", "unlink"}
    check_points(tmp_path, points)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_killed_at_random_moments(tmp_path, workers):
    moments = random.Random(int(workers))
    # A run sleeps 2.1 seconds (21 batches of 0.1) and is not over before.
    points = [moments.uniform(0.1, 1.9) for _ in range(20)]
    check_points(tmp_path, points, RESUME_SLEEP="0.1", RESUME_WORKERS=workers)


#: another length, another plan
LONGER = {"epochs": 3, "extend": "hold"}
PLAN = resume_task.PLAN.replace("0.01", "0.02")


def went_on(folder, points, settings, starts=("begun", "cut")):
    """Which of the runs that were resumed with settings, killed, and resumed without, have them."""
    drive(folder, [job(folder / "begun"), job(folder / "cut", ["replace", 5, "after"])])
    began = [folder / name for name in starts]  # one is finished, one is not
    jobs, cases = [], []
    for start in began:
        shutil.copytree(start, folder / f"{start.name}-whole")
        jobs.append(job(folder / f"{start.name}-whole", **settings))
        for number, point in enumerate(points):
            out = folder / f"{start.name}-{number}"
            shutil.copytree(start, out)
            jobs += [job(out, point, **settings), job(out)]
            cases.append((start, out, point))
    statuses = drive(folder, jobs)
    assert set(statuses) == {0, -9}
    assert statuses.count(-9) == len(cases)
    found = []
    for start, out, point in cases:
        whole = folder / f"{start.name}-whole"
        plain = folder / "begun"
        length = checkpoint.newest(out / "checkpoints").content["clock"]
        longer = length > checkpoint.newest(plain / "checkpoints").content["clock"]
        assert_same(out, whole if longer else plain)
        assert (out / "plan.toml").read_text() == (
            (whole if longer else plain) / "plan.toml"
        ).read_text()
        found.append((*point, longer))
    return found


#: before and after run.json has its name, before plan.toml has, and before the first save has
ASKED = [
    ("replace", 1, "before", False),
    ("replace", 1, "after", True),
    ("replace", 2, "before", True),
    ("replace", 4, "before", True),
]


@pytest.mark.parametrize(
    ("start", "asked"),
    [
        ("cut", ASKED[:2]),
        pytest.param("begun", ASKED, marks=pytest.mark.slow),
        pytest.param("cut", ASKED[2:], marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_lengthened_and_killed_stays_so(tmp_path, start, asked):
    """All that was asked for is kept from the write of run.json on, and nothing of it before."""
    points = [list(point[:3]) for point in asked]
    assert went_on(tmp_path, points, {**LONGER, "plan": PLAN}, [start]) == asked


@pytest.mark.slow
def test_a_run_that_was_lengthened_and_killed_at_every_write_stays_so(tmp_path):
    points = [
        [name, number, when]
        for name, count in (("write", 9), ("fsync", 10), ("replace", 5))
        for number in range(1, count + 1)
        for when in ("before", "after")
    ]
    found = went_on(tmp_path, points, {**LONGER, "plan": PLAN})
    first = {("write", 1), ("fsync", 1), ("replace", 1)}
    kept = [longer for name, number, when, longer in found if (name, number) not in first]
    assert kept
    assert all(kept)
