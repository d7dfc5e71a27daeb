"""The end of a run in one table."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..checkpoint import FOLDER, step_of
from ..training.result import Result


def summary(console: Console, result: Result) -> None:
    """Print what came of a run and where it is; for the main process, which has a folder."""
    if result.interrupted is not None:
        print(interruption(result), file=sys.stderr)
    noun = result.task.examples
    # The loss last: what people ask for first comes first.
    metrics = sorted(result.metrics.items(), key=lambda item: item[0] == "loss")
    rows = [(f"{name} on held-out {noun}", f"{value:.4g}") for name, value in metrics]
    rows.append((f"held-out {noun}", f"{result.examples:,}"))
    rows += [(name, f"{value:.4g}") for name, value in result.baseline.items()]
    rows.append(("plan", str(result.confirmation)))
    rows.append(("time", f"{result.seconds:.1f} s for {result.steps:,} steps"))
    if result.reuse is not None:
        rows.append(("reuse", str(result.reuse)))
    rows.append(("folder", str(result.folder)))
    rows.append(("files", ", ".join(sorted(result.saved))))
    if result.checkpoint is not None:
        rows.append(("checkpoint", f"{FOLDER}/{result.checkpoint.name}"))
    console.print()
    if not console.is_terminal:  # a log: nothing is folded
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"{name:<{width}}  {value}")
        return
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    console.print(table)


def interruption(result: Result) -> str:
    """Return what is left of a run that was stopped."""
    if result.checkpoint is None:
        kept = "no checkpoint was saved before"
    else:
        step = step_of(result.checkpoint)
        kept = f"the state after step {step} is in {FOLDER}/{result.checkpoint.name}"
        if step < result.steps:
            kept += ", the last checkpoint"
        kept += f"; to resume: lamina run --resume {result.folder}"
    return f"lamina: interrupted after step {result.steps}; {kept}"
