"""The words of `lamina run`, `show` and `explain`, which name a task and a plan in one way.

    [TASK] [PLAN.toml]

A plan is for a task: a plan alone is an error, so that it is never tried on a model that its author
did not mean. Without either, the example task is taken with its own plan. A run that is resumed
has its task already, so there a plan may stand alone.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import TaskError
from ..training.example_tasks import DEFAULT, example_tasks

Words = tuple[str | None, str | None]


def task_and_plan(
    command: Sequence[str], words: Words, option: str | None, saved: Callable[[], str] | None = None
) -> tuple[str, Path | None]:
    """Return the task and the plan that a command is about.

    Args:
        command: the words before these two, for messages.
        words: the two words as given.
        option: what `--task` names.
        saved: gives the task of the run to resume; None if none is resumed.

    Raises:
        TaskError: if a plan has no task, or the words are in the wrong order.
    """
    task, plan = _split(command, words, option)
    path = None if plan is None else Path(plan)
    if task is not None:
        return task, path
    if saved is not None:
        return saved(), path
    if plan is None and DEFAULT in example_tasks():
        return DEFAULT, None
    if plan is None:
        raise TaskError(
            "no task is named. A task is a Python file with model(), data() and loss(model, batch);"
            f" write one with: lamina new-task my_task.py, then: "
            f"{_line(command, 'my_task.py')}. The example tasks come with a clone of lamina."
        )
    raise TaskError(
        f"{plan} is a plan, but no task is named; name the one that it is for: "
        f"{_line(command, 'my_task.py', plan)}, or, for the example task, "
        f"{_line(command, DEFAULT, plan)}"
    )


def check_parameter(name: str, words: Words) -> None:
    """Raise `TaskError` if a file stands where `lamina explain` expects a parameter's name."""
    if not (_is_plan(name) or _is_task_file(name)):
        return
    given = [word for word in words if word is not None]
    # The name may have been given last, as in `explain my_task.py layer.0.weight`.
    names = [word for word in given if not (_is_plan(word) or _is_task_file(word))]
    files = sorted((name, *(word for word in given if word not in names)), key=_is_plan)
    raise TaskError(
        f"{name} is a file, and explain begins with the full name of a parameter, such as: "
        f"{_line(['explain'], *(names or ['layer.0.weight']), *files)}"
    )


def _split(
    command: Sequence[str], words: Words, option: str | None
) -> tuple[str | None, str | None]:
    """Return which word is the task and which the plan."""
    first, second = words
    if first is not None and second is not None and (_is_plan(first) or _is_task_file(second)):
        raise TaskError(
            f"{first} {second}: the task stands before its plan, and there is one of each: "
            f"{_line(command, second, first)}"
        )
    alone = second is None and first is not None and _is_plan(first)
    task, plan = (None, first) if alone else (first, second)
    if option is None:
        return task, plan
    if task is not None:
        rest = [] if plan is None else [plan]
        raise TaskError(
            f"{task} and --task {option} both name the task, and a plan is a .toml file; leave out "
            f"one of them, such as: {_line(command, option, *rest)}"
        )
    return option, plan


def _is_plan(word: str) -> bool:
    return word.endswith(".toml")


def _is_task_file(word: str) -> bool:
    return word.endswith(".py") and Path(word).is_file()


def _line(command: Sequence[str], *words: str) -> str:
    return shlex.join(["lamina", *command, *words])
