"""What a run came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals

from ..preview.verify import Confirmation
from .run_reuse import ReuseReport
from .task import Task


@dataclass(frozen=True)
class Result:
    """What a run came to, on the main process; other processes have no folder and no baseline."""

    task: Task
    metrics: dict[str, float]
    examples: int
    steps: int
    seconds: float
    folder: Path | None = None
    saved: tuple[str, ...] = ()
    #: the newest one; None if the run ended before the first
    checkpoint: Path | None = None
    baseline: dict[str, float] = field(default_factory=dict)
    confirmation: Confirmation | None = None
    #: the signal that stopped the run before its end (SIGINT, SIGTERM); None if it was not stopped
    interrupted: Signals | None = None
    #: what was replayed; None if the run did not reuse
    reuse: ReuseReport | None = None
