"""Going on with a run: what its folder holds, and whether it can go on as it began.

Everything is read and checked before anything is changed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import checkpoint
from .._util.randomness import State
from ..errors import StateError, TaskError, shortened
from ..plan.plan import Plan
from .dealing import Dealing
from .devices import launched
from .load import choose_plan
from .position import Position
from .ready import ReadyRun, Resumption
from .run_folder import ABOUT, PENDING, PLAN, PLAN_AS_PYTHON, plan_text, read_about
from .settings import Settings
from .snapshot import Snapshot, check_model
from .task import Task


def find(home: Path, task: Task) -> Resumption:
    """Return the newest checkpoint of a run that is whole.

    Raises:
        StateError: if there is none, or it is of another task.
    """
    about = read_about(home)
    if not checkpoint.candidates(home / checkpoint.FOLDER):
        raise StateError(
            f"{home}: the run has no checkpoint, so there is nothing to resume: it ended before it "
            "saved one, or still runs. Begin another with --out (and --save-every, to save more "
            "often)."
        )
    found = checkpoint.newest(home / checkpoint.FOLDER)
    snapshot = Snapshot.of(found.content, found.path)
    if snapshot.task != task.name:
        raise StateError(
            f"{found.path}: the checkpoint is of the task {snapshot.task!r}, but {task.name!r} was "
            f"given. Resume it with its own task."
        )
    if checkpoint.step_of(found.path) != snapshot.clock:
        raise StateError(
            f"{found.path}: the checkpoint is of step {snapshot.clock}; it was renamed. Give it "
            "back its name, or remove it."
        )
    return Resumption(home, found.path, snapshot, found.damaged, about)


def saved_task(folder: str | os.PathLike[str], examples: Mapping[str, str] | None = None) -> str:
    """Return the task that a run was begun with, as `load_task` takes it.

    Resuming runs the code of the task, and run.json may be somebody else's. So the name in it must
    be that of an example task, and a file must be given by its whole path and lie outside the
    folder of the run; any other has to be named on the command line.

    Args:
        folder: that of the run.
        examples: the files of the example tasks by name.

    Raises:
        StateError: if run.json names no task.
        TaskError: if the task is one that only the user can vouch for.
    """
    home = Path(folder)
    about = read_about(home)
    name, file = about.get("task"), about.get("task_file")
    again = f"name it before --resume if you trust it: lamina run TASK.py --resume {home}."
    if file is None:
        if not isinstance(name, str):
            raise StateError(f"{home}: run.json does not name the task; {again}")
        if name not in (examples or {}):
            raise TaskError(
                f"{home}: run.json names the task {shortened(name)!r}, which is no example "
                f"task, and gives no file of it; {again}"
            )
        return name
    if not isinstance(file, str) or not os.path.isabs(file) or "\0" in file:
        raise TaskError(
            f"{home}: run.json gives {shortened(repr(file))} as the task's file; expected its "
            f"whole path. To go on with a file of your own, {again}"
        )
    try:
        inside = home.resolve() in Path(file).resolve().parents
    except (OSError, RuntimeError, ValueError):
        inside = True
    if inside:
        raise TaskError(
            f"{home}: the task file {shortened(file)} lies in the folder of the run; {again}"
        )
    return file


def resumed_plan(
    found: Resumption, task: Task, given: Plan | str | os.PathLike[str] | None
) -> tuple[Plan, str]:
    """Return the plan given, else the one the run began with; and where it is written."""
    if given is not None:
        return choose_plan(task, given)
    path, as_python = found.folder / PLAN, found.folder / PLAN_AS_PYTHON
    name, text = _pending(found)
    if name == PLAN:
        return Plan.from_toml(text), str(found.folder / ABOUT)
    if not name and path.exists():
        return Plan.from_toml(path), str(path)
    if not name and as_python.exists():
        text = as_python.read_text(encoding="utf-8", errors="replace")
    plan, place = choose_plan(task, None)
    if plan_text(plan)[0] != (text or found.snapshot.plan):
        raise StateError(
            f"{found.folder}: there is no {PLAN} (it was removed, or the plan could not be written "
            "as TOML), and the task's own plan is another one now. Give the plan again, as it was "
            "or as it shall be."
        )
    return plan, place


def _pending(found: Resumption) -> tuple[str, str]:
    """Return name and text of a plan whose file a kill left unwritten; else "" twice."""
    pending = found.about.get(PENDING)
    if not isinstance(pending, dict) or len(pending) != 1:
        return "", ""
    [(name, text)] = pending.items()
    return (name, text) if name in (PLAN, PLAN_AS_PYTHON) and isinstance(text, str) else ("", "")


def check_fits(found: Resumption, session: ReadyRun) -> None:
    """Raise `StateError` for what would not go on as it began."""
    snapshot = found.snapshot
    saved = snapshot.data | {"batches_in_a_step": found.batches_in_a_step}
    now_there = session.data_form()
    if snapshot.processes != session.accelerator.num_processes:
        # Each process has another number of batches, and all have the same number of steps.
        before = _dealt_before(found)
        saved["steps_per_epoch"] = -(-saved.pop("batches", 0) // before.accumulate)
        now_there["steps_per_epoch"] = -(-now_there.pop("batches") // session.dealing.accumulate)
    for name, now in now_there.items():
        then = saved.get(name)
        if now != then:
            raise StateError(
                f"{found.path}: the training data had {then} {name.replace('_', ' ')} when the "
                f"checkpoint was saved, and has {now} now, so the run cannot go on where it stood. "
                "Resume with the data and batch size as they were."
            )
    check_model(session.model, snapshot.model, found.path)


def _check_unfinished(found: Resumption, session: ReadyRun) -> None:
    """Raise if nothing is left to do; a run killed after its last save is not finished yet."""
    snapshot, run = found.snapshot, session.optimizer.resolved.run
    done, total = session.progress(_position(found, session)), run.steps or 0
    closed = found.about.get("status") == "finished" or total != snapshot.steps
    if done > total or (done == total and snapshot.validated and closed):
        raise StateError(
            f"{found.folder}: the run is finished: it is at step {done} of {total}. To train "
            f"longer, give more --epochs than {session.settings.epochs:g}."
        )
    if session.optimizer.should_stop and snapshot.validated and closed:
        raise StateError(
            f"{found.folder}: the run is finished: it stopped early at step {done} of {total}. To "
            "train longer, give a plan without stop."
        )


def restore(found: Resumption, session: ReadyRun) -> Position:
    """Put what is saved beside the optimizer's state into a session, if something is left to do."""
    _check_unfinished(found, session)
    snapshot, scaler = found.snapshot, session.accelerator.scaler
    if (scaler is None) != (snapshot.scaler is None):
        raise StateError(
            f"{found.path}: the checkpoint is of a run {_with(snapshot.scaler)} fp16, and this one "
            f"is {_with(scaler)}; resume on the kind of device that it began on."
        )
    position = _position(found, session)
    for state in (position.start, position.before, position.after):
        if state is not None:
            session.randomness.check(state)
    if snapshot.clock != session.optimizer.clock:
        raise StateError(
            f"{found.path}: the checkpoint says step {snapshot.clock}, and the optimizer's state "
            f"in it step {session.optimizer.clock}; it was changed by hand. Use another."
        )
    session.optimizer._run_state.skipped = snapshot.skipped
    session.model.load_state_dict(snapshot.model)
    if scaler is not None:
        scaler.load_state_dict(snapshot.scaler)
    return position


def deal(settings: Settings, found: Resumption | None) -> Dealing:
    """Return how the batches of a step are dealt to the processes that were launched."""
    if found is None:
        return Dealing(settings.accumulate)
    return Dealing.of(found.batches_in_a_step, launched()[0])


def _dealt_before(found: Resumption) -> Dealing:
    return Dealing.of(found.batches_in_a_step, found.snapshot.processes)


def _position(found: Resumption, session: ReadyRun) -> Position:
    """Return where this process stands: after the same steps, by its own number of batches.

    With another number of processes, those that were not there draw from sources of their own, but
    in the order of data that the first has; the number of batches before this one is another too.
    """
    snapshot, process = found.snapshot, int(session.accelerator.process_index)
    if snapshot.processes == session.accelerator.num_processes:
        return snapshot.position(process)
    steps = -(-snapshot.batches // _dealt_before(found).accumulate)
    batches = min(steps * session.dealing.accumulate, len(session.train_loader))
    first = snapshot.position(0)
    own = snapshot.position(process) if process < snapshot.processes else _newcomer(session, first)
    return replace(own, batches=batches, before=None)


def _newcomer(session: ReadyRun, first: Position) -> Position:
    """Return the position of the first process with random states that no other process has."""
    from accelerate.utils import set_seed

    now = session.randomness.now()
    set_seed((session.settings.seed + session.optimizer.clock) % 2**32, device_specific=True)
    fresh = session.randomness.now()
    session.randomness.set(now)

    def own(state: State | None) -> State | None:
        return None if state is None else {**fresh, "generators": state["generators"]}

    return replace(first, start=own(first.start), after=own(first.after))


def _with(scaler: Any) -> str:
    return "without" if scaler is None else "with"
