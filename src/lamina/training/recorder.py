"""Writing what a run tells, line by line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ..errors import StateError
from ..files.atomic import atomic, wrap_write_errors
from ..record.writers import LineFile
from .records import Event, StepRecord, Validation


class Recorder(LineFile):
    """Appends every record to `metrics.jsonl`; `lamina.record.Record.load` reads it."""

    def on_step(self, record: StepRecord) -> None:
        fields = asdict(record)
        if not record.groups:  # of most steps of a long run
            del fields["groups"]
        self.line("step", fields)

    def on_event(self, event: Event) -> None:
        fields = asdict(event)
        self.line("event", {"step": event.step, "event": fields.pop("kind"), **fields})

    def on_validation(self, result: Validation) -> None:
        self.line("validation", asdict(result))


def cut_back(path: Path, length: int) -> None:
    """Cut the record of a run back to where it stood, at once or not at all.

    A record that was removed begins anew.

    Raises:
        StateError: if the file is shorter, or that place is within a line.
    """
    if not path.exists():
        return
    # Opened for writing too: a record that cannot be written fails before anything is changed.
    with wrap_write_errors(path), path.open("r+b") as file:
        kept = file.read(length)
        more = file.read(1)
    if len(kept) < length or (kept and not kept.endswith(b"\n")):
        raise StateError(
            f"{path}: the record of the run was changed since the checkpoint was saved: it has "
            f"{len(kept):,} bytes, and at {length:,} a line should end. Put it back as it was, or "
            "remove it to go on without the earlier lines."
        )
    if more:
        with atomic(path) as new:
            new.write(kept)


def recorded_lr(path: Path, length: int, clock: int) -> tuple[list[dict[str, float]], int]:
    """Return the lr of each group in the steps before the clock, from the first bytes of a record.

    The steps follow each other: they begin after the last that is missing. The number is that of
    damaged lines, which are passed over: a run goes on without them.
    """
    if not path.exists():
        return [], 0
    with wrap_write_errors(path), path.open("rb") as file:
        lines = file.read(length).splitlines()
    found, damaged = {}, 0
    for line in lines:
        try:
            row = json.loads(line)
            if row["kind"] == "step":
                found[int(row["step"])] = {name: float(lr) for name, lr in row["lr"].items()}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            damaged += 1
    first = clock
    while first - 1 in found:
        first -= 1
    return [found[step] for step in range(first, clock)], damaged
