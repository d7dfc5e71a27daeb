"""Two processes that resume one run at the same time: one wins, the other says who holds it."""

from __future__ import annotations

import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from test_resume import assert_same

from . import TESTS
from .count import Counts, Wrong

#: a task whose import waits for the other process, and whose steps take long enough to overlap
TASK = """
import os, sys, time
from pathlib import Path

sys.path.insert(0, {tests!r})
import resume_task
from lamina.training.run_folder import RunFolder
from resume_task import *

RunFolder.picture = lambda *_: None
STOP_AT = int(os.environ.get("RESUMES_STOP_AT", "-1"))
calls = iter(range(10**9))

meeting = os.environ.get("RESUMES_MEETING")
if meeting:
    Path(meeting, str(os.getpid())).touch()
    end = time.monotonic() + 60
    while len(os.listdir(meeting)) < 2 and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(float(os.environ["RESUMES_DELAY"]))


def loss(model, batch):
    if next(calls) == STOP_AT:
        raise KeyboardInterrupt
    time.sleep(float(os.environ.get("RESUMES_SLEEP", "0")))
    return resume_task.loss(model, batch)
"""
HELD = re.compile(r"another process uses this run: process (\d+) on \S+, since 20")


def resumes(
    full: bool = True, lock: bool = True, times: int | None = None, fresh: bool | None = None
) -> list[Counts]:
    """Start two `lamina run --resume` of one folder together, many times.

    Args:
        full: 60 times instead of once, by processes that begin from nothing.
        lock: keep the lock of the folder; without it the faults are to be seen.
        times: how often, if not that.
        fresh: whether the processes begin from nothing, or as forks that have imported torch.
    """
    counts = Counts("two resumes of one run", limit=60.0)
    start = Popen if (full if fresh is None else fresh) else Forked
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        task = home / "task.py"
        task.write_text(TASK.format(tests=str(TESTS)) + ("" if lock else UNLOCKED))
        begin(home, task, start)
        for seed in range(times or (60 if full else 1)):
            counts.attempt(seed, lambda seed=seed: race(home, seed, start))
    return [counts]


class Process(Protocol):
    """A command line that was started."""

    pid: int

    def end(self) -> tuple[int, str]: ...


class Popen:
    """`python -m lamina` with arguments, in a process that begins from nothing."""

    def __init__(self, arguments: list[str], more: dict[str, str]) -> None:
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lamina", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def end(self) -> tuple[int, str]:
        """Wait, and return the exit status and what was said on standard error."""
        try:
            said = self._process.communicate(timeout=300)[1]
        finally:
            self._process.kill()
        return self._process.returncode, said


class Forked:
    """The same in a fork of this process: it has imported what takes the most time."""

    def __init__(self, arguments: list[str], more: dict[str, str]) -> None:
        import lamina.cli.app  # noqa: F401

        self._said = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            os.environ.update(more)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(self._said.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = ["lamina", *arguments]
            status = run_module()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def end(self) -> tuple[int, str]:
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with self._said as file:
            return status, Path(file.name).read_text()


def run_module() -> int:
    """Run `lamina` as a command and return its exit status; an exception is shown."""
    try:
        runpy.run_module("lamina", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


UNLOCKED = """
from lamina.training import folder_lock
folder_lock.FileLock.acquire = lambda self, *args, **keywords: None
"""


def begin(home: Path, task: Path, start: Callable[..., Process]) -> None:
    """Make the run that was stopped in the middle, and the same one that was not."""
    for name, stop_at, expected in (("stopped", "9", 130), ("whole", "-1", 0)):
        arguments = [
            "run",
            str(task),
            "--cpu",
            "--out",
            str(home / name),
            "--save-every",
            "5 steps",
        ]
        status, said = start(arguments, {"RESUMES_STOP_AT": stop_at}).end()
        if status != expected:
            raise RuntimeError(f"the run could not be begun: {said}")


def race(home: Path, seed: int, start: Callable[..., Process]) -> str:
    """Resume a copy of the run twice at once, and judge what both said and left."""
    chance = random.Random(seed)
    out, meeting = home / f"run-{seed}", home / f"meeting-{seed}"
    shutil.copytree(home / "stopped", out)
    meeting.mkdir()
    about = {"RESUMES_MEETING": str(meeting), "RESUMES_SLEEP": "0.15", "RESUMES_STOP_AT": "-1"}
    processes = [
        start(["run", "--resume", str(out), "--cpu"], {**about, "RESUMES_DELAY": str(delay)})
        for delay in (0.0, chance.choice((0.0, 0.0, 0.001, 0.01, 0.1)))
    ]
    codes, said = zip(*[process.end() for process in processes], strict=True)
    judge(list(codes), list(said), [process.pid for process in processes])
    judge_folder(home / "whole", out)
    shutil.rmtree(out)
    return "taken"


def judge(codes: list[int], said: list[str], pids: list[int]) -> None:
    if sorted(codes) != [0, 2]:
        raise Wrong(f"both ended with {codes}: {said}")
    loser = codes.index(2)
    if "Traceback" in "".join(said):
        raise Wrong(f"a traceback: {said}")
    lines = said[loser].strip().splitlines()
    if len(lines) != 1:
        raise Wrong(f"not one line: {said[loser]}")
    if "the run is finished" in lines[0]:
        raise Wrong("the second one came after the first one's end, so that this was no race")
    holder = HELD.search(lines[0])
    if holder is None:
        raise Wrong(f"the holder is not named: {lines[0]}")
    if int(holder[1]) != pids[1 - loser]:
        raise Wrong(f"process {holder[1]} is named, but {pids[1 - loser]} holds it")


def judge_folder(whole: Path, out: Path) -> None:
    """Require a record with each step once, and the bits of the run that was not stopped."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    if steps != sorted(set(steps)):
        raise Wrong(f"the record has steps twice or out of order: {steps}")
    try:
        assert_same(whole, out)
    except AssertionError as error:
        raise Wrong(f"other bits than a run that was not stopped: {error}") from error
