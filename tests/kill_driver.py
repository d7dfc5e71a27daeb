"""Runs training in processes of its own and kills them: python kill_driver.py JOBS.json

Each job is {"out": folder, "kill": null | [call, number, "before" | "after"] | seconds, "settings":
those of a run that is resumed}: the run is begun, or resumed if it was saved before, and killed
with SIGKILL at that call of a function that writes, or after that time. What the functions that
write were called goes to JOBS.json.calls.
The processes are forks of one that has trained already, and so has imported all that is needed.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import resume_task
from lamina import LaminaError, checkpoint
from lamina.files import atomic as files
from lamina.training import fit
from lamina.training.run_folder import RunFolder

SETTINGS = {"epochs": 2, "save_every": 5, "cpu": True}
#: the functions through which everything reaches the disk
WRITING = [
    (files.Hashing, "write"),
    (os, "fsync"),
    (os, "replace"),
    (os, "link"),
    (os, "unlink"),
]


def dying(function, name, calls, kill):
    """The function, counted; the process is killed at one of its calls."""

    def counted(*args, **keywords):
        calls[name] += 1
        here = kill is not None and kill[:2] == [name, calls[name]]
        if here and kill[2] == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return function(*args, **keywords)
        finally:  # also if it fails, as removing what is not there does
            if here:
                os.kill(os.getpid(), signal.SIGKILL)

    return counted


def train(out, kill, settings):
    """Begin or resume a run in this process; returns how often each function was called."""
    calls = Counter()
    for owner, name in WRITING:
        setattr(owner, name, dying(getattr(owner, name), name, calls, kill))
    folder = Path(out)
    if checkpoint.candidates(folder / "checkpoints"):
        fit(resume_task, resume=folder, cpu=True, **settings)
    else:  # nothing was saved yet: from the beginning
        shutil.rmtree(folder, ignore_errors=True)
        calls.clear()
        fit(resume_task, out=folder, **SETTINGS)
    return calls


def run(job):
    """Train in a fork; returns its exit status, 0 or minus the signal."""
    kill = job["kill"]
    child = os.fork()
    if not child:
        status = 1
        try:
            point = kill if isinstance(kill, list) else None
            calls = train(job["out"], point, job.get("settings", {}))
            Path(f"{job['out']}.calls").write_text(json.dumps(calls))
            status = 0
        except LaminaError as error:
            print(job, error, file=sys.stderr)
            if kill is None and "the run is finished" in str(error):
                status = 0  # it was killed after that was written
        finally:
            os._exit(status)
    if isinstance(kill, float):
        time.sleep(kill)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    RunFolder.picture = lambda *_: None
    path = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        fit(resume_task, out=folder, epochs=0.1, cpu=True)
    statuses = [run(job) for job in json.loads(path.read_text())]
    path.with_suffix(".statuses").write_text(json.dumps(statuses))
