"""The commands. Each one says what it does in a few lines; the work is done below them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
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
    Cpu,
    Epochs,
    Full,
    PlanWord,
    PlotFile,
    Precision,
    Reuse,
    ReuseSpace,
    Steps,
    TaskOption,
    TaskWord,
    announce,
    announce_reuse,
    cli_errors,
    preview_of_task,
    print_json,
    reuse_setting,
)
from .diff import diff
from .find_lr import find_lr
from .init import init
from .new_task import write_task
from .plot import plot
from .previews import task_forecast
from .resumed import announce_run
from .summary import summary
from .watch import watch

#: the commands in the order of the help: what a newcomer needs first
_ORDER = (
    *("run", "show", "plot", "check", "explain", "diff"),
    *("new-task", "init", "find-lr", "tasks"),
    *("report", "compare", "inspect", "watch"),
)


# The options of `lamina run` alone.
RunSeed = Annotated[
    int | None, typer.Option(help="Random seed for weights, dropout and data order.")
]
Out = Annotated[
    Path | None, typer.Option(help="New folder for the run. [default: runs/TASK-DATE-TIME]")
]
Resume = Annotated[Path | None, typer.Option(help="Folder of the run to resume.")]
Extend = Annotated[
    str | None,
    typer.Option(
        help="For a resumed run of another length: 'hold' keeps its schedules, 'stretch' fits "
        "them to the new length."
    ),
]
SaveEvery = Annotated[
    str | None,
    typer.Option(
        help="Time between checkpoints, such as '500 steps' or '10%'. [default: 1 epochs]"
    ),
]
Keep = Annotated[
    int | None, typer.Option(help="Checkpoints to keep, besides the best. [default: 2]")
]
Fsdp = Annotated[bool | None, typer.Option(help="Shard the model over all processes (FSDP2).")]


class _InOrder(typer.core.TyperGroup):
    """Lists the commands in the order of `_ORDER`."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=_ORDER.index)


app = typer.Typer(
    cls=_InOrder,
    help="One plan for how every parameter of a model trains.",
    epilog="Exit codes: 0 done; 1 the answer is no (check found a problem, find-lr has no "
    "suggestion); 2 an error, explained on stderr; 130 Ctrl-C; 143 SIGTERM; 141 closed pipe.",
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
    seed: RunSeed = None,
    accumulate: Accumulate = None,
    out: Out = None,
    resume: Resume = None,
    extend: Extend = None,
    save_every: SaveEvery = None,
    keep: Keep = None,
    mixed_precision: Precision = None,
    fsdp: Fsdp = None,
    reuse: Reuse = None,
    reuse_space: ReuseSpace = None,
    cpu: Cpu = False,
    full: Full = False,
) -> None:
    """Preview the plan, train TASK with it, and print the results."""
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
            reuse=reuse_setting(reuse, reuse_space),
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
                announce_reuse(session.forecast)
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
    steps: Steps = None,
    accumulate: Accumulate = None,
    reuse: Reuse = None,
    reuse_space: ReuseSpace = None,
    plot: PlotFile = None,
    full: Full = False,
    as_json: AsJson = False,
) -> None:
    """Preview a plan on the model of TASK, without training."""
    with cli_errors():
        source, plan_file = task_and_plan(["show"], (task, plan), task_option)
        if epochs is not None and steps is not None:
            raise LaminaError(
                f"--epochs {epochs:g} and --steps {steps} both give the length of the run; pass "
                "one."
            )
        asked: dict[str, Any] = {"epochs": epochs, "accumulate": accumulate}
        preview = preview_of_task(source, plan_file, steps, **asked)
        asked["reuse"] = reuse_setting(reuse, reuse_space)
        forecast = task_forecast(source, plan_file, EXAMPLES, preview.run, **asked)
        if as_json:
            found = {} if forecast is None else {"reuse": asdict(forecast)}
            print_json({**preview.data(), **found})
        else:
            announce(Console(), preview, full)
            announce_reuse(forecast)
        if plot is not None:
            try:
                preview.plot(plot)
            except (OSError, ValueError) as error:  # matplotlib: an unknown kind of file
                raise LaminaError(
                    f"--plot {plot}: the picture cannot be written ({error}). Choose a .png, .svg "
                    "or .pdf file in a folder that exists."
                ) from error
            print(f"wrote {plot}", file=sys.stderr if as_json else sys.stdout)


@app.command(epilog="Example: lamina explain layer.0.weight my_task.py --step 100")
def explain(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Full name of a parameter, such as head.weight.")
    ],
    task: TaskWord = None,
    plan: PlanWord = None,
    task_option: TaskOption = None,
    step: Annotated[int, typer.Option(help="Optimizer step, counted from 0.", min=0)] = 0,
    epochs: Epochs = None,
    accumulate: Accumulate = None,
    as_json: AsJson = False,
) -> None:
    """Explain where each value of one parameter comes from.

    For every setting of it: the rules that set it, in order, and the value at a step.
    """
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
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A checkpoint file, or the folder of a run.")
    ],
    as_json: AsJson = False,
) -> None:
    """Describe a checkpoint or a run folder."""
    with cli_errors():
        if as_json:
            print_json(inspect_values(path))
        else:
            print(describe(path))


@app.command(epilog="Example: lamina report runs/first -o report.html")
def report(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="HTML file to write. [default: report.html in RUN]"),
    ] = None,
) -> None:
    """Write the report of a run, finished or not, as one HTML file."""
    with cli_errors():
        from .report import report_run

        print(f"wrote {report_run(path, out)}")


@app.command(epilog="Example: lamina compare runs/first runs/second")
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(metavar="OTHER", help="Folder of another run.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="HTML file to write as well.")
    ] = None,
) -> None:
    """Compare two runs: settings, plan, learning rates and metrics."""
    with cli_errors():
        from .report import compare_runs

        print(printable(compare_runs(first, second, out)))
        if out is not None:
            print(f"\nwrote {out}")


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
        print("To start a task of your own: lamina new-task my_task.py")


@app.command("new-task", epilog="Example: lamina new-task my_task.py")
def new_task(
    path: Annotated[
        Path, typer.Argument(metavar="FILE.py", help="Python file to write; it must be new.")
    ],
) -> None:
    """Write a small, complete task file to start from."""
    with cli_errors():
        write_task(path)
        print(f"wrote {path}; to train it: lamina run {path}")


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
