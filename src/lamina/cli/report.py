"""`lamina report` and `lamina compare`: look at runs, while they go on or afterwards."""

from __future__ import annotations

from pathlib import Path

from ..report_page import write_comparison, write_report
from ..report_page.compare import Compared, compare
from ..report_page.source import Source
from ..training.read_run import ReadRun, read_run


def report_run(folder: Path, out: Path | None) -> Path:
    """Write the report of a run; returns its path, by default `report.html` in the folder."""
    run = read_run(folder)
    path = folder / "report.html" if out is None else out
    write_report(run.record, path, planned=run.planned, title=run.title, facts=run.settings)
    return path


def compare_runs(first: Path, second: Path, out: Path | None) -> str:
    """Return how two runs differ, as text; write it as a page too, if a file is named."""
    left, right = (_compared(folder) for folder in (first, second))
    if left.label == right.label:
        left, right = _compared(first, str(first)), _compared(second, str(second))
    if out is not None:
        write_comparison(left, right, out)
    return str(compare(left, right))


def _compared(folder: Path, label: str = "") -> Compared:
    run: ReadRun = read_run(folder)
    source = Source(run.record, run.planned, title=run.title, facts=run.settings)
    return Compared(label or run.title, source, run.settings, run.plan)
