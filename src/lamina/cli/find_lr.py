"""`lamina find-lr`: a learning-rate range test of a task."""

from __future__ import annotations

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
    Cpu,
    Epochs,
    PlanWord,
    PlotFile,
    Precision,
    TaskOption,
    TaskWord,
    cli_errors,
    print_json,
)

Low = Annotated[float, typer.Option(help="Lowest learning rate to try.")]
High = Annotated[float, typer.Option(help="Highest learning rate to try.")]
TestedRates = Annotated[
    int, typer.Option(help="Learning rates to try, one step each; at least 20.")
]
Repeats = Annotated[int, typer.Option(help="Number of tests, each on other batches; at least 3.")]
VariedRule = Annotated[str | None, typer.Option(help="Group or pattern whose lr alone is varied.")]
At = Annotated[
    int | None, typer.Option(help="Step of the plan to test at. [default: that of its highest lr]")
]
TestSeed = Annotated[int | None, typer.Option(help="Random seed for weights, data and test.")]


def find_lr(
    task: TaskWord = None,
    plan: PlanWord = None,
    task_option: TaskOption = None,
    low: Low = 1e-7,
    high: High = 10.0,
    steps: TestedRates = 100,
    repeats: Repeats = 3,
    rule: VariedRule = None,
    at: At = None,
    epochs: Epochs = None,
    seed: TestSeed = None,
    accumulate: Accumulate = None,
    mixed_precision: Precision = None,
    cpu: Cpu = False,
    plot: PlotFile = None,
    as_json: AsJson = False,
) -> None:
    """Suggest a learning rate for TASK, by a range test on a copy.

    The learning rates of all groups keep their ratios; the suggestion is for the highest one.
    Exits with 1 if the test allows no suggestion, and prints the reason.
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
                print(printable(f"wrote {plot}"))
    if found.suggestion is None:
        raise typer.Exit(NO)
