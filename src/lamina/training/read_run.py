"""What a run folder tells, also of a run that still goes on or was killed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StateError
from ..files.atomic import wrap_read_errors
from ..record.planned import Planned
from ..record.record import Record
from .run_folder import METRICS, PLAN, PLAN_AS_PYTHON, PLANNED, read_about

#: of `run.json`, what a reader of a report looks for, in this order
_SETTINGS = (
    "task", "status", "started", "ended", "steps", "steps_taken", "epochs", "seed", "accumulate",
    "mixed_precision", "device", "processes", "save_every", "keep", "extend",
)  # fmt: skip
_MOST = 1_000_000


@dataclass(frozen=True)
class ReadRun:
    """A run as its folder tells it; what is missing in the folder is empty or None."""

    folder: Path
    record: Record
    planned: Planned | None
    settings: Mapping[str, str]
    plan: str

    @property
    def title(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name


def read_run(folder: Path) -> ReadRun:
    """Read the folder of a run.

    Args:
        folder: as `lamina run` wrote it; it may still be written, or end in the middle of a line.

    Raises:
        StateError: if it is not the folder of a run, or one of its files is damaged.
    """
    about = read_about(folder)
    metrics, planned = folder / METRICS, folder / PLANNED
    with wrap_read_errors(folder):
        record = Record.load(metrics) if metrics.exists() else Record()
        plan = Planned.load(planned) if planned.exists() else None
    return ReadRun(folder, record, plan, _settings(about, record), _plan_text(folder))


def _settings(about: Mapping[str, Any], record: Record) -> dict[str, str]:
    found = {key: str(about[key])[:500] for key in _SETTINGS if about.get(key) is not None}
    versions = about.get("versions")
    if isinstance(versions, dict):
        found["versions"] = ", ".join(f"{key} {value}" for key, value in versions.items())[:500]
    baseline = about.get("baseline")
    if isinstance(baseline, dict) and baseline:
        found["baseline"] = ", ".join(f"{key} {value}" for key, value in baseline.items())[:500]
    if record.damaged_lines:
        found["damaged lines"] = f"{record.damaged_lines} of {METRICS} were skipped"
    return found


def _plan_text(folder: Path) -> str:
    for called in (PLAN, PLAN_AS_PYTHON):
        path = folder / called
        with wrap_read_errors(path):
            if path.exists():
                text = path.read_bytes()[:_MOST]
                try:
                    return text.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise StateError(f"{path}: is no text in UTF-8 ({error}).") from error
    return ""
