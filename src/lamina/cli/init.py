"""`lamina init`: a commented plan that fits the model of a task, or that a function makes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..errors import LaminaError, TaskError, printable
from ..files.atomic import atomic
from ..starter import starter_plan
from ..training.load import load_task
from .arguments import task_and_plan
from .common import EXAMPLES
from .model_function import model_of


def init(
    task: Annotated[
        str | None,
        typer.Argument(metavar="TASK", help="Task whose model the plan is for."),
    ] = None,
    task_option: Annotated[
        str | None,
        typer.Option("--task", metavar="TASK", help="The task, instead of the TASK argument."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE:FUNCTION", help="Function that returns the model, instead of a task."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FILE.toml", help="New file to write. [default: print]"
        ),
    ] = None,
) -> None:
    """Write a commented starter plan for a model."""
    if out is not None:
        _check_free(out)
    if model is not None and (task is not None or task_option is not None):
        raise TaskError(
            f"{task or task_option} and --model {model} both name the model; pass one of them."
        )
    if model is not None:
        made = model_of(model)
    else:
        if task is not None and task.endswith(".toml"):
            raise TaskError(
                f"{task}: this is a plan; init writes one, for the model of a task: "
                f"{shlex.join(['lamina', 'init', 'my_task.py', '-o', task])}"
            )
        source, _ = task_and_plan(["init"], (task, None), task_option)
        made = load_task(source, EXAMPLES).model()
    text = str(starter_plan(made))
    if out is None:
        print(text, end="")
        return
    _write(out, text)
    named = task or task_option or ("my_task.py" if model else "")
    command = shlex.join(["lamina", "show", *([named] if named else []), str(out)])
    print(f"wrote {printable(str(out))}; to see what it means: {printable(command)}")


def _check_free(path: Path) -> None:
    """Raise `LaminaError` if a plan cannot be written here, before a model is made for it."""
    shown = printable(str(path))
    if path.suffix != ".toml":
        raise LaminaError(f"-o {shown}: expected the name of a .toml file, such as plan.toml.")
    if path.exists() or path.is_symlink():
        raise LaminaError(f"-o {shown}: this file exists, and is left as it is; give another name.")
    if not path.parent.is_dir():
        raise LaminaError(f"-o {shown}: there is no such folder; make it first.")


def _write(path: Path, text: str) -> None:
    """Write a new file, whole or not at all."""
    try:
        path.touch(exist_ok=False)  # of two commands at once, one has the name
    except FileExistsError:
        _check_free(path)
        raise
    except OSError as error:
        raise LaminaError(
            f"-o {printable(str(path))}: cannot be written ({error.strerror or error})."
        ) from error
    try:
        with atomic(path) as file:
            file.write(text.encode())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
