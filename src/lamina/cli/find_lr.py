"""`lamina find-lr`: a learning-rate range test of a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import printable
from ..files.pictures import check_picture
from ..training.load import load_task
from .arguments import task_and_plan
from .common import (
    EXAMPLES,
    NO,
    Accumulate,
    AsJson,
    Epochs,
    PlanWord,
    TaskOption,
    TaskWord,
    cli_errors,
    print_json,
)


def find_lr(
    task: TaskWord = None,
    plan: PlanWord = None,
    task_option: TaskOption = None,
    low: Annotated[float, typer.Option(help="The lowest learning rate.")] = 1e-7,
    high: Annotated[float, typer.Option(help="The highest learning rate.")] = 10.0,
    steps: Annotated[int, typer.Option(help="Learning rates between them, a step each.")] = 100,
    repeats: Annotated[int, typer.Option(help="How often, each with other batches.")] = 3,
    rule: Annotated[
        str | None, typer.Option(help="The group or pattern whose lr alone is swept.")
    ] = None,
    at: Annotated[
        int | None, typer.Option(help="The step at which the plan is held; its peak by default.")
    ] = None,
    epochs: Epochs = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, data and test.")] = None,
    accumulate: Accumulate = None,
    mixed_precision: Annotated[str | None, typer.Option(help="no, fp16 or bf16.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Even if there is an accelerator.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw it: a PNG, SVG or PDF file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Suggest a learning rate for TASK by a range test; nothing of it is kept.

    All learning rates of the plan keep their ratios, and the suggestion is that of the highest.
    Ends with 1 if the test allows no suggestion; the reason is printed.
    """
    from ..training.range_test import find_lr_of_task

    with cli_errors():
        source, plan_file = task_and_plan(["find-lr"], (task, plan), task_option)
        if plot is not None:
            check_picture(plot, "--plot")  # not after minutes of training
        found = find_lr_of_task(
            load_task(source, EXAMPLES),
            plan_file,
            epochs=epochs,
            seed=seed,
            accumulate=accumulate,
            mixed_precision=mixed_precision,
            cpu=cpu,
            low=low,
            high=high,
            steps=steps,
            repeats=repeats,
            rule=rule,
            at=at,
        )
        if as_json:
            print_json(found.as_dict())
        else:
            print(found)
        if plot is not None:
            found.plot(plot)
            if not as_json:
                print(printable(f"drawn to {plot}"))
    if found.suggestion is None:
        raise typer.Exit(NO)
