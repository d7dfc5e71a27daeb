"""The commands. Each one says what it does in a few lines; the work is done below them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..checkpoint.inspect import inspect as describe
from ..checkpoint.inspect import inspect_values
from ..errors import LaminaError, printable
from ..training.engine import prepare_run
from ..training.example_tasks import DEFAULT
from ..training.load import load_task
from ..training.resume import saved_task
from ..training.run_folder import own_version
from .arguments import check_parameter, task_and_plan
from .check import check
from .common import (
    EXAMPLES,
    Accumulate,
    AsJson,
    Epochs,
    Full,
    PlanWord,
    TaskOption,
    TaskWord,
    announce,
    cli_errors,
    preview_of_task,
    print_json,
)
from .diff import diff
from .find_lr import find_lr
from .init import init
from .new_task import write_task
from .plot import plot
from .resumed import announce_run
from .summary import summary
from .watch import watch

app = typer.Typer(
    help="One plan for how every parameter of a model trains.",
    epilog="Exit codes: 0 done; 1 the answer is no (check found something, find-lr suggests "
    "nothing); 2 an error, told in one paragraph; 130 Ctrl-C; 143 SIGTERM; 141 a closed pipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


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


@app.command(epilog="Example: lamina run my_task.py my_plan.toml --epochs 3 --out runs/first")
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
    fsdp: Annotated[
        bool | None, typer.Option(help="Shard the model over the processes (FSDP2).")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Even if there is an accelerator.")] = False,
    full: Full = False,
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
            fsdp=fsdp,
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
                announce_run(console, session, full)
                steps = session.preview.run.steps or 0
                passes = -(-steps // (session.preview.run.steps_per_epoch or 1))
                with display(console, passes, steps, session.earlier) as shown:
                    result = session.train([shown])
                summary(console, result)
        if result.interrupted is not None:
            raise typer.Exit(128 + result.interrupted)


@app.command(epilog="Example: lamina show my_task.py my_plan.toml --plot lr.svg")
def show(
    task: TaskWord = None,
    plan: PlanWord = None,
    task_option: TaskOption = None,
    epochs: Epochs = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    accumulate: Accumulate = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it: a PNG, SVG or PDF file.")] = None,
    full: Full = False,
    as_json: AsJson = False,
) -> None:
    """Show what a plan would do with the model of TASK, without training."""
    with cli_errors():
        source, plan_file = task_and_plan(["show"], (task, plan), task_option)
        if epochs is not None and steps is not None:
            raise LaminaError(
                f"--epochs {epochs:g} and --steps {steps} both give the length of the run; pass "
                "one."
            )
        preview = preview_of_task(source, plan_file, steps, epochs=epochs, accumulate=accumulate)
        if as_json:
            print_json(preview.data())
        else:
            announce(Console(), preview, full)
        if plot is not None:
            try:
                preview.plot(plot)
            except (OSError, ValueError) as error:  # matplotlib: an unknown kind of file
                raise LaminaError(
                    f"--plot {plot}: the picture cannot be written ({error}). Choose a .png, .svg "
                    "or .pdf file in a folder that exists."
                ) from error
            print(f"drawn to {plot}", file=sys.stderr if as_json else sys.stdout)


@app.command(epilog="Example: lamina explain layer.0.weight my_task.py --step 100")
def explain(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The full name of a parameter.")],
    task: TaskWord = None,
    plan: PlanWord = None,
    task_option: TaskOption = None,
    step: Annotated[int, typer.Option(help="Counted from 0.", min=0)] = 0,
    epochs: Epochs = None,
    accumulate: Accumulate = None,
    as_json: AsJson = False,
) -> None:
    """Show the chain of rules behind every number of a parameter at a step."""
    with cli_errors():
        check_parameter(name, (task, plan))
        source, plan_file = task_and_plan(["explain", name], (task, plan), task_option)
        preview = preview_of_task(source, plan_file, epochs=epochs, accumulate=accumulate)
        explained = preview.explain(name, step)
        if as_json:
            print_json(explained.data())
        else:
            print(explained)


@app.command(epilog="Example: lamina inspect runs/first")
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run.")],
    as_json: AsJson = False,
) -> None:
    """Say what a saved file holds, without loading a model or a task."""
    with cli_errors():
        if as_json:
            print_json(inspect_values(path))
        else:
            print(describe(path))


@app.command(epilog="Example: lamina report runs/first -o report.html")
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


@app.command(epilog="Example: lamina compare runs/first runs/second")
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


@app.command(epilog="Example: lamina tasks")
def tasks(as_json: AsJson = False) -> None:
    """List the example tasks of a clone of lamina."""
    with cli_errors():
        if as_json:
            print_json([_task_values(name) for name in EXAMPLES])
            return
        for name in EXAMPLES:
            task = load_task(name, EXAMPLES)
            mark = "  (default)" if name == DEFAULT else ""
            print(f"{name:<12} {task.about}{mark}")
        if not EXAMPLES:
            print("The example tasks come with a clone of lamina; this is an installed package.")
        print("To begin a task of your own: lamina new-task my_task.py")


@app.command("new-task", epilog="Example: lamina new-task my_task.py")
def new_task(
    path: Annotated[Path, typer.Argument(metavar="FILE.py", help="The file to write.")],
) -> None:
    """Write a small, complete task file to change into your own."""
    with cli_errors():
        write_task(path)
        print(f"{path} is written. Train it with: lamina run {path}")


def _task_values(name: str) -> dict[str, object]:
    return {
        "name": name,
        "about": load_task(name, EXAMPLES).about,
        "file": EXAMPLES[name],
        "default": name == DEFAULT,
    }


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose errors are printed as those of all commands."""

    @wraps(command)
    def guarded(*args: Any, **options: Any) -> None:
        with cli_errors():
            command(*args, **options)

    return guarded


app.command(epilog="Example: lamina check my_task.py my_plan.toml --json")(check)
app.command("find-lr", epilog="Example: lamina find-lr my_task.py my_plan.toml --plot lr.png")(
    find_lr
)
app.command(epilog="Example: lamina plot my_task.py my_plan.toml --out plan.svg")(plot)
app.command(epilog="Example: lamina diff my_task.py old.toml new.toml")(_guarded(diff))
app.command(epilog="Example: lamina init my_task.py -o plan.toml")(_guarded(init))
# What follows the script is the script's, whatever it looks like.
app.command(
    context_settings={"allow_interspersed_args": False},
    epilog="Example: lamina watch --out runs/seen train.py --epochs 3",
)(watch)
