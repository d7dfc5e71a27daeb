"""What all commands share: how task and plan are named, how errors and results are told.

Exit codes, which `docs/reference/command-line.md` lists: 0 for done, 1 where the answer of a
command is no (`check` found something, `find-lr` suggests nothing), 2 for an error, 128 + n after
the signal n.
"""

from __future__ import annotations

import json
import math
import os
import select
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from .._util import startup as _startup
from ..errors import LaminaError, LaminaWarning, printable
from ..preview import Preview
from ..reuse import Forecast
from ..training.example_tasks import DEFAULT, example_tasks
from ..training.interrupts import raising_on_terminate, signal_of
from .previews import task_previews

EXAMPLES = example_tasks()
#: the exit code of a command whose answer is no
NO = 1
_CLOSED_PIPE = 141  # 128 + SIGPIPE, which Windows has not

TaskWord = Annotated[
    str | None,
    typer.Argument(
        metavar="TASK",
        help=f"Python file of the task, or the name of an example task. [default: {DEFAULT}]",
    ),
]
PlanWord = Annotated[
    str | None,
    typer.Argument(metavar="PLAN.toml", help="Plan for the task. [default: the task's own]"),
]
TaskOption = Annotated[
    str | None,
    typer.Option("--task", metavar="TASK", help="The task, instead of the TASK argument."),
]
Epochs = Annotated[float | None, typer.Option(help="Passes over the training data.")]
Steps = Annotated[
    int | None, typer.Option(help="Length of the run in optimizer steps, instead of --epochs.")
]
Accumulate = Annotated[
    int | None, typer.Option(help="Batches per optimizer step (gradient accumulation).")
]
Precision = Annotated[str | None, typer.Option(help="Numeric precision: no, fp16 or bf16.")]
Cpu = Annotated[
    bool, typer.Option("--cpu", help="Train on the CPU, even if there is an accelerator.")
]
Reuse = Annotated[
    bool | None,
    typer.Option(help="Compute what is frozen once per example, with the same results."),
]
ReuseSpace = Annotated[
    str | None,
    typer.Option(help="Space for that, such as '500 MB'; with it, --reuse is on. [default: 2 GB]"),
]
PlotFile = Annotated[
    Path | None, typer.Option(help="Also draw a picture: a .png, .svg or .pdf file.")
]
Full = Annotated[bool, typer.Option("--full", help="Show every group; fold none.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def announce_reuse(forecast: Forecast | None) -> None:
    """Print what reuse will store and save, stage by stage; nothing without reuse.

    Args:
        forecast: as it was made for the run.
    """
    if forecast is not None:
        print(f"What is frozen is computed once per example (--reuse):\n{forecast}\n", flush=True)


def reuse_setting(reuse: bool | None, space: str | None) -> bool | dict[str, str] | None:
    """Return the setting `reuse` that two options stand for; None for what task or run say.

    Args:
        reuse: `--reuse` or `--no-reuse`.
        space: `--reuse-space`.

    Raises:
        LaminaError: if space is given for nothing.
    """
    if space is None:
        return reuse
    if reuse is False:
        raise LaminaError(
            f"--no-reuse and --reuse-space {space!r} contradict each other; leave out one of them."
        )
    return {"space": space}


@contextmanager
def cli_errors() -> Iterator[None]:
    """Print errors as one paragraph with exit code 2, interruptions as a line; no traceback.

    The exit code of an interruption is the usual one: 130 after Ctrl-C, 143 after SIGTERM.
    """
    _startup.raise_on_ctrl_c()
    try:
        with warnings.catch_warnings(), raising_on_terminate():
            warnings.showwarning = _show_warning
            # A resumed run lists what its load left out among its changes.
            warnings.filterwarnings("ignore", "the saved state was loaded, but", LaminaWarning)
            yield
            sys.stdout.flush()  # or a closed pipe would be told by Python, at its end
    except BrokenPipeError:
        if not _has_no_reader(sys.stdout):  # the pipe of a worker process, say
            raise
        # As for other programs: who closed the pipe, such as `head`, has read enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(_CLOSED_PIPE) from None
    except LaminaError as error:
        print(f"lamina: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as error:
        print("lamina: interrupted; nothing more was saved.", file=sys.stderr)
        raise typer.Exit(128 + signal_of(error)) from None
    finally:
        if _startup.is_command_line():
            _startup.end_quietly_on_signals()


def _has_no_reader(stream: TextIO) -> bool:
    """Return whether a stream is a pipe that nobody reads any more."""
    if not hasattr(select, "poll"):  # on Windows, where a pipe breaks in another way
        return False
    watch = select.poll()
    watch.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    """Print lamina's own warnings as it prints errors: there is no line of the user's."""
    if issubclass(category, LaminaWarning):
        print(f"lamina: {printable(' '.join(str(message).split()))}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


def print_json(value: Any) -> None:
    """Print plain values as JSON; numbers that are not finite, which JSON has not, as null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def preview_of_task(
    source: str, plan_file: Path | None, steps: int | None = None, **asked: Any
) -> Preview:
    """Return a preview of the run that `lamina run` would do in one process."""
    return task_previews(source, [plan_file], EXAMPLES, steps=steps, **asked)[0]


def announce(console: Console, preview: Preview, full: bool = False) -> None:
    """Print a preview: in colour on a terminal, as plain text into a file or a pipe.

    Args:
        console: where to.
        preview: what to print.
        full: every group, in plain text.
    """
    if console.is_terminal and not full:
        console.print(preview)
    else:
        print(preview.text(full=full))
    print(flush=True)
