"""Where the rows of a recorder go: JSON lines, TensorBoard, the loggers of others."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..errors import MissingExtraError, PlanError
from ..files.atomic import wrap_write_errors
from .record import RecordEvent
from .rows import Row


@runtime_checkable
class Logger(Protocol):
    """Any logger: what has `log(values, step)` fits, such as a run of Weights & Biases."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of a step under names such as `lr/head`."""


class Writer(Protocol):
    """What a recorder writes to."""

    def write(self, row: Row) -> None:
        """Write the numbers of a step."""

    def event(self, event: RecordEvent) -> None:
        """Write an event."""

    def close(self) -> None:
        """Write no more."""


class LineFile:
    """Appends JSON objects to a file, one a line, each flushed at once.

    A number that is NaN or infinite is written as null, which JSON can hold.

    Args:
        path: the file; what is in it stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with wrap_write_errors(path):
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def line(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Write a line."""
        text = json.dumps(_finite({"kind": kind, **fields}), allow_nan=False, ensure_ascii=False)
        with wrap_write_errors(self.path):
            # One write of the whole line: a run that is stopped here leaves no half of one.
            self._file.write(text + "\n")
            self._file.flush()

    def sync(self) -> int:
        """Make every line durable; returns the length of the file in bytes."""
        with wrap_write_errors(self.path):
            os.fsync(self._file.fileno())
            return self._file.tell()

    def close(self) -> None:
        """Write no more."""
        with wrap_write_errors(self.path):
            self._file.close()


class JsonLines(LineFile):
    """Writes rows and events as `metrics.jsonl` has them; `Record.load` reads the file."""

    def write(self, row: Row) -> None:
        fields: dict[str, Any] = {"step": row.step}
        if row.groups:
            fields["lr"] = {name: its["lr"] for name, its in row.groups.items() if "lr" in its}
            fields["groups"] = measured(row)
        if row.metrics:
            fields["metrics"] = row.metrics
        self.line("step", fields)

    def event(self, event: RecordEvent) -> None:
        fields = {"step": event.step, "event": event.kind, "text": event.text}
        self.line("event", {**fields, "groups": list(event.groups)})


class TensorBoard:
    """Writes every number as a scalar of TensorBoard.

    Args:
        folder: that of the event files; or a `SummaryWriter` that you made, which stays open.

    Raises:
        MissingExtraError: if tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str] | Any) -> None:
        self._own = isinstance(folder, (str, os.PathLike))
        self._writer: Any = folder
        if isinstance(folder, (str, os.PathLike)):
            self._writer = _summary_writer()(os.fspath(folder))

    def write(self, row: Row) -> None:
        for name, value in row.flat().items():
            self._writer.add_scalar(name, value, row.step)

    def event(self, event: RecordEvent) -> None:
        self._writer.add_text(event.kind, event.text, event.step)

    def close(self) -> None:
        """Write out what is buffered; close the writer if it was made here."""
        (self._writer.close if self._own else self._writer.flush)()


def _summary_writer() -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise MissingExtraError(
            f"Writing for TensorBoard needs the package 'tensorboard', which cannot be imported "
            f"({error}). Install it with: pip install tensorboard"
        ) from error


class ToLogger:
    """Hands the numbers of each step to a logger; events are not its business.

    Args:
        log: called with numbers by name, and `step=`.
    """

    def __init__(self, log: Any) -> None:
        self._log = log

    def write(self, row: Row) -> None:
        self._log(row.flat(), step=row.step)

    def event(self, event: RecordEvent) -> None:
        """Log no event: loggers have no common way for text."""

    def close(self) -> None:
        """Leave the logger to its owner."""


def writer_of(given: Any) -> Writer:
    """Return what writes to a file, TensorBoard or a logger.

    Raises:
        PlanError: for something that nothing is known to write to.
    """
    if isinstance(given, (str, os.PathLike)):
        return JsonLines(Path(given))
    if all(callable(getattr(given, name, None)) for name in ("write", "event", "close")):
        writer: Writer = given
        return writer
    if callable(getattr(given, "add_scalar", None)):  # a SummaryWriter
        return TensorBoard(given)
    for name in ("log_metrics", "log"):  # MLflow and Lightning have both, of which log is another
        if callable(getattr(given, name, None)):
            return ToLogger(getattr(given, name))
    raise PlanError(
        f"recorder was given {given!r:.200}; expected a path, lamina.record.TensorBoard(folder), "
        "or an object with log(values, step), log_metrics(values, step) or add_scalar(...)."
    )


def measured(row: Row) -> dict[str, dict[str, float]]:
    """Return what a row holds of each group beside lr and what follows from the rest."""
    left_out = ("lr", "ratio")
    return {
        name: {key: value for key, value in values.items() if key not in left_out}
        for name, values in row.groups.items()
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
