"""`lamina check`: what is suspicious in a plan, without training."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from ..errors import printable
from ..model.finding import Finding
from ..preview import Preview
from .arguments import task_and_plan
from .common import (
    NO,
    Accumulate,
    AsJson,
    Epochs,
    PlanWord,
    TaskOption,
    TaskWord,
    cli_errors,
    preview_of_task,
    print_json,
)


def check(
    task: TaskWord = None,
    plan: PlanWord = None,
    task_option: TaskOption = None,
    epochs: Epochs = None,
    accumulate: Accumulate = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="CODE", help="Code of a finding that is intended; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look for mistakes in a plan, without training.

    Exits with 0 if there is no problem (advice is printed), with 1 if there probably is one, and
    with 2 if the plan cannot be carried out at all.
    """
    with cli_errors():
        source, plan_file = task_and_plan(["check"], (task, plan), task_option)
        preview = preview_of_task(source, plan_file, epochs=epochs, accumulate=accumulate)
        ignored = set(ignore or ())
        codes = {finding.code for finding in preview.findings}
        if unused := sorted(ignored - codes):
            print(
                f"lamina: --ignore {', '.join(unused)}: there is no such finding here.",
                file=sys.stderr,
            )
        found = [finding for finding in preview.findings if finding.code not in ignored]
        if as_json:
            print_json(_values(preview, found))
        else:
            for finding in found:
                print(printable(f"{finding.severity}: {finding}"))
            print(_summary(preview, found))
    if any(finding.severity == "problem" for finding in found):
        raise typer.Exit(NO)


def _summary(preview: Preview, found: list[Finding]) -> str:
    cells = preview.resolved.cells
    groups = f"{len(cells)} group{'s' * (len(cells) != 1)}"
    size = f"{sum(len(cell.parameters) for cell in cells)} parameters in {groups}"
    problems = sum(finding.severity == "problem" for finding in found)
    advice = len(found) - problems
    return f"{problems or 'no'} problem{'s' * (problems != 1)}, {advice or 'no'} advice: {size}"


def _values(preview: Preview, found: list[Finding]) -> dict[str, Any]:
    cells = preview.resolved.cells
    return {
        "steps": preview.run.steps,
        "groups": len(cells),
        "parameters": sum(len(cell.parameters) for cell in cells),
        "findings": [
            {
                "code": finding.code,
                "severity": finding.severity,
                "message": finding.message,
                "fix": finding.fix,
            }
            for finding in found
        ],
    }
