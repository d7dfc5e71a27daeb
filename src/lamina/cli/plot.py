"""`lamina plot`: the picture of a plan."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import LaminaError, printable
from ..files.atomic import atomic
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

_KINDS = (".png", ".svg", ".pdf")


def plot(
    task: TaskWord = None,
    plan: PlanWord = None,
    task_option: TaskOption = None,
    out: Annotated[Path, typer.Option(help="A PNG, SVG or PDF file.")] = Path("plan.png"),
    epochs: Epochs = None,
    accumulate: Accumulate = None,
) -> None:
    """Draw the learning rate of every group over the run, and when each one trains."""
    with cli_errors():
        source, plan_file = task_and_plan(["plot"], (task, plan), task_option)
        check_picture(out, "--out")  # before a model is loaded
        preview = preview_of_task(source, plan_file, epochs=epochs, accumulate=accumulate)
        write_picture(preview.plot(), out)
        print(printable(f"drawn to {out}"))


def check_picture(path: Path, option: str) -> None:
    """Raise `LaminaError` unless a picture can be written there."""
    if path.suffix not in _KINDS or not path.parent.is_dir():
        raise LaminaError(
            f"{option} {path}: the picture cannot be written there; expected a .png, .svg or .pdf "
            "file in a folder that exists."
        )


def write_picture(figure: Any, path: Path) -> None:
    """Write a figure whole or not at all."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=160, format=path.suffix[1:])
    with atomic(path) as file:
        file.write(drawn.getvalue())
