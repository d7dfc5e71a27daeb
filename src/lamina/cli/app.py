"""The commands. Each one says what it does in a few lines; the work is done below them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..checkpoint.inspect import inspect as describe
from ..errors import LaminaError, printable
from ..preview import Preview
from ..training.engine import prepare_run
from ..training.example_tasks import DEFAULT, example_tasks
from ..training.load import choose_plan, error_location, load_task
from ..training.ready import batches
from ..training.resume import saved_task
from ..training.run_folder import own_version
from ..training.settings import Settings
from .arguments import check_parameter, task_and_plan
from .common import cli_errors
from .new_task import write_task
from .summary import summary
from .watch import watch

EXAMPLES = example_tasks()

app = typer.Typer(
    help="One plan for how every parameter of a model trains.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

TaskWord = Annotated[
    str | None,
    typer.Argument(
        metavar="TASK",
        help=f"A Python file, or in a clone of lamina an example task ({DEFAULT} by default).",
    ),
]
PlanWord = Annotated[
    str | None,
    typer.Argument(metavar="PLAN.toml", help="A plan for that task; by default its own."),
]
TaskOption = Annotated[
    str | None,
    typer.Option("--task", metavar="TASK", help="The task, instead of the argument TASK."),
]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data.")]
Accumulate = Annotated[int | None, typer.Option(help="Batches per optimizer step.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lamina {own_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """One plan for how every parameter of a model trains."""


@app.command()
def run(
    task: TaskWord = None,
    plan: PlanWord = None,
    task_option: TaskOption = None,
    epochs: Epochs = None,
    seed: Annotated[
        int | None, typer.Option(help="Of weights, dropout and the order of data.")
    ] = None,
    accumulate: Accumulate = None,
    out: Annotated[Path | None, typer.Option(help="The folder of the run; a new one.")] = None,
    resume: Annotated[Path | None, typer.Option(help="The folder of a run to go on with.")] = None,
    extend: Annotated[
        str | None, typer.Option(help="Schedules of a resumed run of other length: hold, stretch.")
    ] = None,
    save_every: Annotated[
        str | None, typer.Option(help="Such as '500 steps', '1 epochs' (the default) or '10%'.")
    ] = None,
    keep: Annotated[int | None, typer.Option(help="Checkpoints kept, beside the best; 2.")] = None,
    mixed_precision: Annotated[str | None, typer.Option(help="no, fp16 or bf16.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Even if there is an accelerator.")] = False,
) -> None:
    """Announce the plan, train TASK by it, and show the result."""
    with cli_errors():
        saved = None if resume is None else partial(saved_task, resume, EXAMPLES)
        source, plan_file = task_and_plan(["run"], (task, plan), task_option, saved)
        session = prepare_run(
            load_task(source, EXAMPLES),
            plan_file,
            epochs=epochs,
            seed=seed,
            accumulate=accumulate,
            mixed_precision=mixed_precision,
            save_every=save_every,
            keep=keep,
            cpu=cpu,
            out=out,
            resume=resume,
            extend=extend,
        )
        with session:
            if not session.is_main:
                result = session.train()
            else:
                from ..training.display import display

                console = Console()
                _announce(console, session.preview)
                steps = session.preview.run.steps or 0
                passes = -(-steps // (session.preview.run.steps_per_epoch or 1))
                with display(console, passes, steps, session.earlier) as shown:
                    result = session.train([shown])
                summary(console, result)
        if result.interrupted is not None:
            raise typer.Exit(128 + result.interrupted)


@app.command()
def show(
    task: TaskWord = None,
    plan: PlanWord = None,
    task_option: TaskOption = None,
    epochs: Epochs = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    accumulate: Accumulate = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it: a PNG, SVG or PDF file.")] = None,
) -> None:
    """Show what a plan would do with the model of TASK, without training."""
    with cli_errors():
        source, plan_file = task_and_plan(["show"], (task, plan), task_option)
        if epochs is not None and steps is not None:
            raise LaminaError(
                f"--epochs {epochs:g} and --steps {steps} both give the length of the run; pass "
                "one."
            )
        preview = _preview(source, plan_file, steps, epochs=epochs, accumulate=accumulate)
        console = Console()
        _announce(console, preview)
        if plot is not None:
            try:
                preview.plot(plot)
            except (OSError, ValueError) as error:  # matplotlib: an unknown kind of file
                raise LaminaError(
                    f"--plot {plot}: the picture cannot be written ({error}). Choose a .png, .svg "
                    "or .pdf file in a folder that exists."
                ) from error
            print(f"drawn to {plot}")


@app.command()
def explain(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The full name of a parameter.")],
    task: TaskWord = None,
    plan: PlanWord = None,
    task_option: TaskOption = None,
    step: Annotated[int, typer.Option(help="Counted from 0.", min=0)] = 0,
    epochs: Epochs = None,
    accumulate: Accumulate = None,
) -> None:
    """Show the chain of rules behind every number of a parameter at a step."""
    with cli_errors():
        check_parameter(name, (task, plan))
        source, plan_file = task_and_plan(["explain", name], (task, plan), task_option)
        print(_preview(source, plan_file, epochs=epochs, accumulate=accumulate).explain(name, step))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run.")],
) -> None:
    """Say what a saved file holds, without loading a model or a task."""
    with cli_errors():
        print(describe(path))


@app.command()
def report(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The HTML file; report.html in RUN.")
    ] = None,
) -> None:
    """Write the report of a run, finished or not, as one HTML file."""
    with cli_errors():
        from .report import report_run

        print(f"written to {report_run(path, out)}")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="That of another run.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="An HTML file to write it to as well.")
    ] = None,
) -> None:
    """Say how two runs differ: settings, plan, lr and metrics."""
    with cli_errors():
        from .report import compare_runs

        print(printable(compare_runs(first, second, out)))
        if out is not None:
            print(f"\nwritten to {out}")


@app.command()
def tasks() -> None:
    """List the example tasks of a clone of lamina."""
    with cli_errors():
        for name in EXAMPLES:
            task = load_task(name, EXAMPLES)
            mark = "  (default)" if name == DEFAULT else ""
            print(f"{name:<12} {task.about}{mark}")
        if not EXAMPLES:
            print("The example tasks come with a clone of lamina; this is an installed package.")
        print("To begin a task of your own: lamina new-task my_task.py")


@app.command("new-task")
def new_task(
    path: Annotated[Path, typer.Argument(metavar="FILE.py", help="The file to write.")],
) -> None:
    """Write a small, complete task file to change into your own."""
    with cli_errors():
        write_task(path)
        print(f"{path} is written. Train it with: lamina run {path}")


# What follows the script is the script's, whatever it looks like.
app.command(
    context_settings={"allow_interspersed_args": False},
    epilog="Example: lamina watch --out runs/seen train.py --epochs 3",
)(watch)


def _preview(
    source: str, plan_file: Path | None, steps: int | None = None, **asked: Any
) -> Preview:
    """Return a preview of the run that `lamina run` would do in one process."""
    task = load_task(source, EXAMPLES)
    settings = Settings.of(task, **asked)
    plan, place = choose_plan(task, plan_file)
    loader = task.data(settings.seed).train
    model = task.model()
    with error_location(place):
        return plan.preview(
            model,
            steps=steps,
            epochs=settings.epochs if steps is None else None,
            steps_per_epoch=batches(task, loader),
            accumulate=settings.accumulate,
        )


def _announce(console: Console, preview: Preview) -> None:
    if console.is_terminal:
        console.print(preview)
    else:
        print(preview)
    print(flush=True)
