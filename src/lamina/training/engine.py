"""`prepare_run` settles everything that can be wrong; `Session.train` then trains and writes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

from .._util.notices import warn
from ..errors import LaminaError, require
from ..plan.plan import Plan
from ..runtime.agreement import compare, describe_plan
from ..schedules.duration import TimeLike
from .devices import begin, end, is_first, launched
from .folder_lock import FolderLock
from .load import choose_plan, error_location, load_task
from .loaders import has_own_order
from .ready import Resumption
from .records import Listener
from .result import Result
from .resume import deal, find, resumed_plan
from .run_folder import check_free, read_about
from .session import Session
from .settings import Settings
from .task import Data, Task


def prepare_run(
    task: Task | ModuleType | str | os.PathLike[str],
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    epochs: float | None = None,
    seed: int | None = None,
    accumulate: int | None = None,
    mixed_precision: str | None = None,
    save_every: TimeLike | None = None,
    keep: int | None = None,
    fsdp: bool | None = None,
    reuse: bool | Mapping[str, Any] | None = None,
    cpu: bool = False,
    out: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    extend: str | None = None,
) -> Session:
    """Do everything up to the first step; what fails here leaves nothing behind.

    Args:
        task: a task, its module, or the path of its file.
        plan: a plan, or the path or text of one; by default the task's own.
        epochs: passes over the data, not necessarily whole ones.
        seed: of the weights, dropout and, unless its loader has a generator, the order of the data.
        accumulate: batches per optimizer step.
        mixed_precision: "no", "fp16" or "bf16"; by default as `accelerate launch` says, else no.
        save_every: the time between checkpoints, such as "500 steps"; by default an epoch.
        keep: how many checkpoints to keep, beside the best; by default 2.
        fsdp: shard the model over the processes (FSDP2), instead of a copy in each (DDP).
        reuse: compute what is frozen once per example: True, or options (see `ReuseSettings`).
        cpu: train on the CPU even if there is an accelerator.
        out: the folder of the run; by default a new one under `runs`.
        resume: the folder of a run to go on with; plan and settings are its own if none is given.
        extend: for a resumed run of other `epochs`: "hold" its schedules, or "stretch" them.

    Raises:
        LaminaError: for a task, plan or setting that does not work, or a run that cannot go on.
    """
    _check_setting(fsdp)
    task, folder = load_task(task), None if out is None else Path(out)
    asked: dict[str, Any] = {"epochs": epochs, "seed": seed, "accumulate": accumulate, "keep": keep}
    asked |= {"mixed_precision": mixed_precision, "save_every": save_every}
    asked |= {"fsdp": fsdp, "reuse": reuse}
    with ExitStack() as undo:
        start = None if resume is None else _resumption(Path(resume), folder, task, undo)
        if start is None:
            settings, chosen, place = _begin(task, plan, asked, folder, extend)
        else:
            settings, chosen, place = start.settings(**asked), *resumed_plan(start, task, plan)
            extend = start.way(settings) if extend is None else extend
        dealing = deal(settings, start)
        accelerator = begin(settings, dealing.accumulate, cpu)
        undo.callback(end, accelerator)
        check_alike(accelerator, chosen, settings, start)
        data = _data(task, settings.seed, seed if accelerator.is_main_process else None)
        made = (task, settings, accelerator, task.model(), chosen, data, dealing, folder)
        with error_location(place):
            session = Session(*made, start, extend)
        session.undo = undo.pop_all()
    return session


def _check_setting(fsdp: bool | None) -> None:
    """Raise if a package is missing; warn if the model is to be shared, but with nobody."""
    require("accelerate", "train", "Training")
    require("matplotlib", "train", "Training (the picture of the plan)")
    require("filelock", "train", "Training (one process at a time in a run)")
    if fsdp and launched()[0] == 1:
        warn(
            "fsdp=True was given, but one process trains, and has nobody to share the model with. "
            "Start several with torchrun, or leave it out."
        )


def _data(task: Task, seed: int, asked: int | None) -> Data:
    """Return the task's data; warn if a seed that was asked for cannot reach its order."""
    data = task.data(seed)
    if asked is not None and has_own_order(data.train) and not task.takes("seed"):
        warn(
            f"seed={asked} was given, but the order of the training data comes from the generator "
            f"that data() of {task.place} makes; the seed sets only the weights and dropout. To "
            "have it set the order too, let data(seed) take it."
        )
    return data


def _begin(
    task: Task, plan: Any, asked: dict[str, Any], folder: Path | None, extend: str | None
) -> tuple[Settings, Plan, str]:
    """Return settings and plan of a new run."""
    if extend is not None:
        raise LaminaError(
            f"extend={extend!r} says how a resumed run goes on; name its folder with --resume."
        )
    settings = Settings.of(task, **asked)
    if folder is not None:
        check_free(folder)
    return settings, *choose_plan(task, plan)


def _resumption(home: Path, out: Path | None, task: Task, undo: ExitStack) -> Resumption:
    """Take the folder of a run that goes on, until `undo` ends; then choose its checkpoint.

    Of several processes that train together the first one takes it for all.
    """
    if out is not None:
        raise LaminaError(
            f"out={str(out)!r} and resume={str(home)!r} both name the folder of the run; a "
            "run goes on in its own folder. Leave out --out."
        )
    read_about(home)  # which says what is wrong with a folder that is not that of a run
    if is_first():
        undo.callback(FolderLock(home).release)
    return find(home, task)


def check_alike(accelerator: Any, plan: Plan, settings: Settings, start: Resumption | None) -> None:
    """Raise on every process if they were given different things, before one waits for another.

    Args:
        accelerator: that of the run.
        plan: as this process has it.
        settings: as this process has them.
        start: where the run goes on.
    """
    from accelerate.utils import gather_object

    checkpoint = "" if start is None else start.path.name
    mine = {"checkpoint": checkpoint, "settings": str(settings), **describe_plan(plan)}
    every = gather_object([mine])
    rank = int(accelerator.process_index)
    others = [other for other, theirs in enumerate(every) if theirs != mine]
    if others:
        compare(mine, every[others[0]], rank, others[0], LaminaError)


def fit(
    task: Task | ModuleType | str | os.PathLike[str],
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    listeners: Sequence[Listener] = (),
    **settings: Any,
) -> Result:
    """Train a task by a plan: `prepare_run`, then `Session.train`; arguments as there."""
    with prepare_run(task, plan, **settings) as session:
        return session.train(listeners)
