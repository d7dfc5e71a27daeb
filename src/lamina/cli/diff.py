"""`lamina diff`: what changes between two plans, on the model of a task."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..errors import TaskError, printable
from ..preview.sparkline import can_show
from ..preview.table import in_ascii
from .arguments import task_and_plan
from .common import EXAMPLES, Accumulate, AsJson, Epochs, Steps, TaskOption, print_json
from .previews import task_previews


def diff(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[TASK] [BEFORE.toml] AFTER.toml",
            help="A task and two plans for it; one plan is compared with the task's own.",
        ),
    ],
    task_option: TaskOption = None,
    epochs: Epochs = None,
    steps: Steps = None,
    accumulate: Accumulate = None,
    as_json: AsJson = False,
) -> None:
    """Show what changes between two plans: parameters, steps, values."""
    source, before, after = task_and_plans(words, task_option)
    if epochs is not None and steps is not None:
        raise TaskError(
            f"--epochs {epochs:g} and --steps {steps} both give the length of the run; pass one."
        )
    asked = {"epochs": epochs, "accumulate": accumulate}
    earlier, later = task_previews(source, [before, after], EXAMPLES, steps=steps, **asked)
    found = earlier.diff(later)
    if as_json:
        hashes = {"hash_before": earlier.hash, "hash_after": later.hash}
        print_json({**found.data(), **hashes})
    else:
        text = printable(str(found))
        print(text if can_show() else in_ascii(text))


def task_and_plans(words: Sequence[str], option: str | None) -> tuple[str, Path | None, Path]:
    """Return the task, the earlier plan (None for the task's own) and the later one.

    Raises:
        TaskError: if the words are too many, in another order, or no plan is among them.
    """
    plans = [word for word in words if word.endswith(".toml")]
    others = [word for word in words if not word.endswith(".toml")]
    if not 1 <= len(plans) <= 2 or len(others) > 1 or list(words) != [*others, *plans]:
        task = others[0] if others else option or "my_task.py"
        raise TaskError(
            f"{shlex.join(words)}: expected a task, then one plan or two, which are .toml files, "
            f"such as: {shlex.join(['lamina', 'diff', task, 'old.toml', 'new.toml'])}"
        )
    pair = (others[0], plans[-1]) if others else (plans[-1], None)
    source, after = task_and_plan(["diff"], pair, option)
    assert after is not None
    return source, Path(plans[0]) if len(plans) == 2 else None, after
