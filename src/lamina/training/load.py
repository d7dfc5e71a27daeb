"""Finding a task (a Python file, an example, or a module) and the plan to train it by."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from ..errors import LaminaError, PlanError, TaskError, did_you_mean
from ..files.atomic import wrap_read_errors
from ..plan.plan import Plan
from .task import Task, in_one_line, where


def load_task(
    source: str | os.PathLike[str] | ModuleType | Task, examples: Mapping[str, str] | None = None
) -> Task:
    """Return a task from a file, the name of an example task, or a module.

    Args:
        source: the path of a Python file, or a name among `examples`.
        examples: the file of each example task, by name.

    Raises:
        TaskError: if there is no such task, or it lacks what every task gives.
    """
    if isinstance(source, Task):
        return source
    if isinstance(source, ModuleType):
        return Task(source.__name__.rpartition(".")[2], source)
    text, known = os.fspath(source), examples or {}
    if text in known:
        return Task(text, _from_file(Path(known[text])))
    path = Path(text)
    if path.suffix == ".toml":
        raise TaskError(
            f"{text}: this is a plan, not a task; give the task first and then its plan."
        )
    if path.suffix != ".py":
        raise TaskError(
            f"there is no task {text!r}; expected a Python file"
            f"{', or one of: ' + ', '.join(known) if known else ''}.{did_you_mean(text, known)}"
        )
    with wrap_read_errors(path):
        if not path.is_file():
            raise TaskError(f"{text}: there is no such task file; check the path.")
    return Task(_plain(path.stem), _from_file(path), os.path.abspath(path))


def choose_plan(task: Task, plan: Plan | str | os.PathLike[str] | None) -> tuple[Plan, str]:
    """Return the plan asked for, else the task's own; and where it is written, for messages."""
    if isinstance(plan, Plan):
        return plan, ""
    if plan is None:
        return task.plan(), f"{task.place}, PLAN"
    text = os.fspath(plan)
    return Plan.from_toml(plan), "plan text" if "\n" in text else text


@contextmanager
def error_location(place: str) -> Iterator[None]:
    """Name the file in what a plan, read without fault, gets wrong about a model."""
    try:
        yield
    except PlanError as error:
        raise type(error)(f"{place}: {error}" if place else str(error)) from error


def _from_file(path: Path) -> ModuleType:
    name = f"lamina_task_{_plain(path.stem)}"
    loader = SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # as `python task.py` has it: a task may import its neighbours
        sys.path.insert(0, folder)
    sys.modules[name] = module  # worker processes of a loader unpickle its classes by this name

    try:
        loader.exec_module(module)
    except LaminaError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError):
            fix = f"Install it with: pip install {str(error.name).partition('.')[0]}"
        else:
            fix = "Correct it and try again."
        raise TaskError(
            f"{where(error, str(path))}: the task cannot be imported: {in_one_line(error)}. {fix}"
        ) from error
    return module


def _plain(name: str) -> str:
    """Return a name that is safe in the names of modules and folders."""
    return re.sub(r"\W+", "_", name).strip("_") or "task"
