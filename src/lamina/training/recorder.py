"""Writing what a run tells: lines flushed one by one, files that are whole or absent."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import LaminaError
from .records import Event, StepRecord, Validation


class Recorder:
    """Appends every record to `metrics.jsonl`, one JSON object a line, flushed at once.

    A number that is NaN or infinite is written as null, which JSON can hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with told(path):
            self._file = path.open("a", encoding="utf-8")

    def on_step(self, record: StepRecord) -> None:
        self._write("step", asdict(record))

    def on_event(self, event: Event) -> None:
        fields = asdict(event)
        self._write("event", {"step": event.step, "event": fields.pop("kind"), **fields})

    def on_validation(self, result: Validation) -> None:
        self._write("validation", asdict(result))

    def close(self) -> None:
        """Write no more."""
        with told(self.path):
            self._file.close()

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        line = json.dumps(_finite({"kind": kind, **fields}), allow_nan=False, ensure_ascii=False)
        with told(self.path):
            # One write of the whole line: a run that is stopped here leaves no half of one.
            self._file.write(line + "\n")
            self._file.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn a failing disk into an error that names the file."""
    try:
        yield
    except OSError as error:
        raise LaminaError(
            f"{path}: cannot be written ({error.strerror or error}). Free some space, or choose "
            "another folder with --out."
        ) from error


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Write a file that appears complete or not at all: temporary file, fsync, rename."""
    with told(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def _umask() -> int:
    """What is withheld from new files; mkstemp withholds more."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Make a rename durable, where folders can be opened (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
