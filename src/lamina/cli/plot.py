"""`lamina plot`: the picture of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import printable
from ..files.pictures import check_picture, write_picture
from .arguments import task_and_plan
from .common import (
    Accumulate,
    Epochs,
    PlanWord,
    TaskOption,
    TaskWord,
    cli_errors,
    preview_of_task,
)


def plot(
    task: TaskWord = None,
    plan: PlanWord = None,
    task_option: TaskOption = None,
    out: Annotated[Path, typer.Option(help="Picture to write: a .png, .svg or .pdf file.")] = Path(
        "plan.png"
    ),
    epochs: Epochs = None,
    accumulate: Accumulate = None,
) -> None:
    """Draw the learning rates of a plan, and when each group trains."""
    with cli_errors():
        source, plan_file = task_and_plan(["plot"], (task, plan), task_option)
        check_picture(out, "--out")  # before a model is loaded
        preview = preview_of_task(source, plan_file, epochs=epochs, accumulate=accumulate)
        write_picture(preview.plot(), out)
        print(printable(f"wrote {out}"))
