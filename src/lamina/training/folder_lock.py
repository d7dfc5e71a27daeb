"""One process at a time in the folder of a run.

Two that resume the same run would both choose the same checkpoint, and write the same steps twice
into one record. The lock is taken before a checkpoint is chosen and kept until the end; the
operating system gives it back when the process ends, however it does.
"""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import LaminaError, StateError, printable, shortened

LOCK, HOLDER = ".lock", ".holder"
#: what a lock leaves in a folder, beside the files of the run
FILES = (LOCK, HOLDER)
#: seconds in which a process that has just taken a lock will have said so
_PATIENCE = 1.0


class FolderLock:
    """Holds the folder of a run until `release`.

    Args:
        folder: that of the run; it exists.

    Raises:
        StateError: if another process holds it, with which one.
        LaminaError: if the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._holder = folder / HOLDER
        self._lock = FileLock(folder / LOCK, timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise StateError(
                f"{folder}: another process uses this run: {_said(self._holder)}. Wait until it "
                "ends, or stop it first."
            ) from None
        except (OSError, NotImplementedError) as error:
            raise LaminaError(
                f"{folder}: the folder of the run cannot be locked ({error}), which keeps a second "
                "process from writing to it. Use a folder that can be written to."
            ) from error
        about = {"pid": os.getpid(), "host": platform.node(), "since": now()}
        with suppress(OSError):  # only for the message of others
            self._holder.write_text(json.dumps(about), encoding="utf-8")

    def release(self) -> None:
        """Give the folder back."""
        if self._lock.is_locked:
            with suppress(OSError):
                self._holder.unlink(missing_ok=True)
            self._lock.release()


def _said(holder: Path) -> str:
    """Return in words which process holds a lock, as far as it has said so.

    Between taking the lock and saying so lies a moment, in which nothing is written yet, or a name
    is left of a process that was killed.
    """
    end = time.monotonic() + _PATIENCE
    about = _read(holder)
    while (about is None or _is_gone(about)) and time.monotonic() < end:
        time.sleep(0.02)
        about = _read(holder)
    if about is None:
        return "it has just begun"
    text = f"process {about['pid']} on {about['host']}, since {about['since']}"
    return printable(shortened(text))


def _read(holder: Path) -> dict[str, Any] | None:
    """Return what a holder has written about itself, or None if that is not there or not whole."""
    try:
        about: Any = json.loads(holder.read_text(encoding="utf-8")[:1000])
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(about, dict) and {"pid", "host", "since"} <= about.keys()
    return about if whole else None


def _is_gone(about: dict[str, Any]) -> bool:
    """Return whether a process of this host is known to have ended."""
    if os.name != "posix" or about["host"] != platform.node():
        return False
    try:
        os.kill(about["pid"], 0)  # sends nothing
    except ProcessLookupError:
        return True
    except (OSError, OverflowError, TypeError, ValueError):
        return False  # it is somebody else's, or no process number
    return False


def now() -> str:
    """Return the time as run folders write it, with its zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
