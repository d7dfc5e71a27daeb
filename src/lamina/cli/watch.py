"""`lamina watch`: run any training script, and say what it really did."""

from __future__ import annotations

import json
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import torch
import typer

from .._util import startup as _startup
from ..errors import LaminaError, printable
from ..files.atomic import atomic
from ..model.finding import Finding
from ..training.run_folder import ABOUT, make_folder, own_version
from ..watch.script import check_script, run_script
from ..watch.session import Seen
from .common import cli_errors

#: seconds between two saves of the record while the script runs
_SAVE_EVERY = 60.0
RECORD, FINDINGS, REPORT = "metrics.jsonl", "findings.json", "report.html"


def watch(
    script: Annotated[
        str, typer.Argument(metavar="SCRIPT", help="Python file to run (or a module, with -m).")
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS", help="The script's own arguments.")
    ] = None,
    module: Annotated[
        bool, typer.Option("-m", "--module", help="Run SCRIPT as a module, like python -m.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder for the results. [default: runs/watch-SCRIPT-DATE-TIME]"),
    ] = None,
) -> None:
    """Run a training script unchanged, and report its mistakes.

    Options of lamina come before SCRIPT; everything after it is passed to the script. The exit code
    is that of the script.

    Under torchrun, rank 0 is watched: torchrun --nproc-per-node 2 -m lamina watch train.py
    """
    with cli_errors():
        if not module:
            check_script(script)
        is_first = os.environ.get("RANK", "0") == "0"
        name = script if module else Path(script).stem
        folder = make_folder(out, f"watch-{name}").resolve() if is_first else None
    _startup.raise_on_ctrl_c()
    writer = Writer(folder, shlex.join([*(("-m",) if module else ()), script, *(arguments or ())]))
    code = run_script(script, arguments or (), module, writer.finish, writer.begin)
    raise typer.Exit(code)


class Writer:
    """Writes what was seen, now and then and at the end.

    Args:
        folder: where to; None in processes that write nothing.
        command: what is run, for people.
    """

    def __init__(self, folder: Path | None, command: str) -> None:
        self._folder = folder
        self._command = command
        self._began = self._saved = time.monotonic()
        self._started = f"{datetime.now():%Y-%m-%d %H:%M:%S}"

    def begin(self, seen: Seen) -> None:
        """Save the record every minute, in case the process is killed."""
        if self._folder is not None:
            self._describe("running")
            seen.after_step(lambda: self._save(seen))

    def _save(self, seen: Seen) -> None:
        if self._folder is not None and time.monotonic() - self._saved > _SAVE_EVERY:
            self._saved = time.monotonic()
            seen.record.save(self._folder / RECORD)

    def _describe(self, status: str) -> dict[str, str]:
        """Write what is run and how it stands, as the folder of any run tells it."""
        about = {
            "task": self._command,
            "status": status,
            "started": self._started,
            "versions": {"lamina": own_version(), "torch": str(torch.__version__)},
        }
        assert self._folder is not None
        with atomic(self._folder / ABOUT) as file:
            file.write((json.dumps(about, indent=2) + "\n").encode())
        return {key: value for key, value in about.items() if isinstance(value, str)}

    def finish(self, seen: Seen) -> None:
        """Print the findings, and write record, findings and report."""
        if self._folder is None:
            return
        # Files first: the script may have closed stderr.
        written, failed = self._write(seen)
        print(summary(seen, time.monotonic() - self._began), file=sys.stderr)
        if failed is not None:
            print(f"lamina: {printable(' '.join(str(failed).split()))}", file=sys.stderr)
        if written:
            print(f"lamina: {self._folder} holds {', '.join(written)}", file=sys.stderr, flush=True)

    def _write(self, seen: Seen) -> tuple[list[str], LaminaError | None]:
        """Write all files; return the names of those that are there, and what stopped it."""
        assert self._folder is not None
        written = []
        try:
            facts = self._describe("ended")
            seen.record.save(self._folder / RECORD)
            written.append(RECORD)
            with atomic(self._folder / FINDINGS) as file:
                file.write(findings_json(seen.findings).encode())
            written.append(FINDINGS)
            seen.report(self._folder / REPORT, title=self._command, facts=facts)
            written.append(REPORT)
        except LaminaError as error:  # also where what writes reports is not installed
            return written, error
        return written, None


def findings_json(findings: Sequence[Finding]) -> str:
    """Return findings as JSON: a list of objects with code, severity, message and fix."""
    rows = [
        {"code": each.code, "severity": each.severity, "message": each.message, "fix": each.fix}
        for each in findings
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def summary(seen: Seen, seconds: float) -> str:
    """Return what was seen as text for a terminal or a log."""
    problems = sum(each.severity == "problem" for each in seen.findings)
    advice = len(seen.findings) - problems
    lines = [
        "",
        f"lamina watch: {_count(seen.steps, 'optimizer step')} in {seconds:.1f} s, "
        f"{_count(problems, 'problem')}, {advice} advice.",
    ]
    if not seen.steps:
        lines.append("No step of a torch optimizer was seen.")
    for each in seen.findings:
        lines += ["", f"{each.severity}: {each.code}", *_wrapped(each.message), *_wrapped(each.fix)]
    if seen.findings:
        lines += [
            "",
            "Each is explained, with wrong and right code, in docs/reference/findings.md.",
        ]
    if seen.failure is not None:
        lines += ["", *_wrapped(f"The watch itself failed, so it saw less: {seen.failure}", "")]
    return printable("\n".join(lines))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _wrapped(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=indent, subsequent_indent=indent)
