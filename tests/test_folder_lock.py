"""One process at a time in the folder of a run, and runs that are stopped from outside."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import lamina as lm
import training_task
from lamina.training.engine import fit, prepare_run
from lamina.training.folder_lock import HOLDER, FolderLock
from lamina.training.interrupts import Terminated, graceful_interrupt, raising_on_terminate

PLAN = lm.Plan("SGD", lr=0.1)
HERE = Path(__file__).parent


def status(out):
    return json.loads((out / "run.json").read_text())["status"]


@pytest.fixture
def stopped(tmp_path):
    """A run that was interrupted after some steps."""
    out = tmp_path / "run"
    calls = iter(range(100))

    task = type(sys)("stopped_task")
    task.__dict__.update(vars(training_task))

    def loss(model, batch):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return training_task.loss(model, batch)

    task.loss = loss  # type: ignore[attr-defined]
    task.__name__ = "training_task"
    assert fit(task, PLAN, out=out, cpu=True).interrupted is signal.SIGINT
    return out


def test_a_lock_names_its_holder_and_is_given_back(tmp_path):
    first = FolderLock(tmp_path)
    with pytest.raises(lm.StateError, match=f"process {os.getpid()} on .*, since 20"):
        FolderLock(tmp_path)
    (tmp_path / HOLDER).write_text("{}")
    with pytest.raises(lm.StateError, match="it has just begun"):
        FolderLock(tmp_path)
    first.release()
    first.release()
    assert not (tmp_path / HOLDER).exists()
    FolderLock(tmp_path).release()


ABOUT = {"host": platform.node(), "since": "2026-01-01T00:00:00+00:00"}


@pytest.mark.parametrize(
    "at_first",
    [None, "", '{"pid": 1, "ho', "[1]", "[" * 1000, "killed"],
    ids=["missing", "empty", "half", "list", "deep", "killed"],
)
def test_a_holder_that_has_not_yet_said_so_is_waited_for(tmp_path, at_first):
    """Nothing, half of it, or what a killed process left: the lock is taken before it is told."""
    if at_first == "killed":
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        at_first = json.dumps({"pid": ended.pid, **ABOUT})
    lock = FolderLock(tmp_path)
    holder = tmp_path / HOLDER
    about = holder.read_text()
    holder.unlink()
    if at_first is not None:
        holder.write_text(at_first)
    late = threading.Timer(0.2, holder.write_text, [about])
    late.start()
    with pytest.raises(lm.StateError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path)
    late.join()
    lock.release()


@pytest.mark.parametrize("pid", ["a word", None, 10**30, -(10**30), 2**31, 1.5, [1]])
def test_a_holder_that_is_no_process_is_told_as_it_is(tmp_path, pid, monkeypatch):
    monkeypatch.setattr("lamina.training.folder_lock._PATIENCE", 0.05)
    lock = FolderLock(tmp_path)
    (tmp_path / HOLDER).write_text(json.dumps({"pid": pid, **ABOUT}))
    with pytest.raises(lm.StateError, match="another process uses this run: process "):
        FolderLock(tmp_path)
    lock.release()


def test_a_run_that_goes_on_cannot_be_resumed_a_second_time(stopped):
    with prepare_run(training_task, resume=stopped, cpu=True) as session:
        with pytest.raises(lm.StateError, match="another process uses this run"):
            prepare_run(training_task, resume=stopped, cpu=True)
        session.train()
    assert status(stopped) == "finished"
    with pytest.raises(lm.StateError, match="the run is finished"):  # and the lock is free again
        prepare_run(training_task, resume=stopped, cpu=True)


def test_a_run_that_has_just_begun_cannot_be_resumed(tmp_path):
    out = tmp_path / "run"
    with prepare_run(training_task, PLAN, out=out, cpu=True) as session:
        refused = []

        class Listener:
            def on_step(self, record):
                if not refused:
                    with pytest.raises(lm.StateError, match="another process") as caught:
                        prepare_run(training_task, resume=out, cpu=True)
                    refused.append(str(caught.value))

            def on_event(self, event):
                pass

            def on_validation(self, validation):
                pass

        session.train([Listener()])
    assert len(refused) == 1
    assert str(os.getpid()) in refused[0]


def test_a_resume_that_fails_leaves_the_folder_free(stopped):
    with pytest.raises(lm.LaminaError):
        prepare_run(training_task, resume=stopped, cpu=True, extend="hold-on")
    with (
        prepare_run(training_task, resume=stopped, cpu=True),
        pytest.raises(lm.StateError, match="another process uses this run"),
    ):
        FolderLock(stopped)
    FolderLock(stopped).release()


def send(number):
    """Send a signal to this process, and wait until it has arrived."""
    os.kill(os.getpid(), number)
    time.sleep(1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_a_second_one_stops_at_once(number):
    before = signal.getsignal(number)
    with graceful_interrupt() as asked_to_stop:
        assert asked_to_stop() is None
        os.kill(os.getpid(), number)
        assert asked_to_stop() is number
        with pytest.raises(KeyboardInterrupt) as caught:
            send(number)
        assert isinstance(caught.value, Terminated) == (number == signal.SIGTERM)
    assert signal.getsignal(number) is before


def test_sigterm_raises_where_nothing_can_be_finished_first():
    with raising_on_terminate(), pytest.raises(Terminated):
        send(signal.SIGTERM)
    with graceful_interrupt(enabled=False), pytest.raises(Terminated):
        send(signal.SIGTERM)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with graceful_interrupt() as asked_to_stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked_to_stop() is None
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("error", [RuntimeError("no disk"), KeyboardInterrupt()])
def test_no_run_stays_on_record_as_running(tmp_path, monkeypatch, error):
    out = tmp_path / "run"

    def fail(*args):
        raise error

    with prepare_run(training_task, PLAN, out=out, cpu=True) as session:
        monkeypatch.setattr(session, "_loop", fail)
        with pytest.raises(type(error)):
            session.train()
    assert status(out) == ("failed" if isinstance(error, RuntimeError) else "interrupted")


def command(*arguments):
    """Start a command line that does not ignore Ctrl-C, as tests in the background do."""
    return subprocess.Popen(
        [sys.executable, "-m", "lamina", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=HERE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for_handlers(process):
    """Wait until a process that starts handles SIGTERM itself; it goes on importing then."""
    status = Path(f"/proc/{process.pid}/status")
    deadline = time.monotonic() + 60
    while status.exists() and time.monotonic() < deadline:
        caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status.read_text(), re.MULTILINE)
        if caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)
    time.sleep(0.7)  # a system without /proc


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_command_line_starts_is_one_line(number):
    process = command("tasks")
    wait_for_handlers(process)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert said == "lamina: interrupted.\n"


SLOWLY = """
from training_task import *
import time
import training_task
DEFAULTS = {"epochs": 10000}

def loss(model, batch):
    time.sleep(0.02)
    return training_task.loss(model, batch)
"""


def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    task = tmp_path / "slow_task.py"
    task.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\n{SLOWLY}")
    out = tmp_path / "run"
    process = command("run", str(task), "--cpu", "--out", str(out))
    for _ in range(600):
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert f"to resume: lamina run --resume {out}" in said
    assert "Traceback" not in said
    assert status(out) == "interrupted"
