"""What became of each attempt of an attack, and how one attempt is judged."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import lamina as lm

#: an error is shown as one line, and quotes a bounded part of what was given
LONGEST_LINE = 2100
COLUMNS = ("refused in one line", "taken", "code run", "hang", "traceback", "wrong")
FAULTS = COLUMNS[2:]


class Hang(BaseException):
    """An attempt took more CPU time than it may; not an `Exception`, so that none catches it."""


class Wrong(Exception):
    """An attempt ended without an error, but not as it should."""


@dataclass
class Counts:
    """How many attempts of one attack ended in which way.

    Args:
        name: that of the attack.
        limit: CPU seconds that an attempt may take.
    """

    name: str
    limit: float = 2.0
    numbers: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COLUMNS, 0))
    slowest: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return sum(self.numbers.values())

    @property
    def faults(self) -> int:
        return sum(self.numbers[kind] for kind in FAULTS)

    def add(self, kind: str, note: str = "") -> None:
        """Count an attempt; of faults the first few are described."""
        self.numbers[kind] += 1
        if kind in FAULTS and len(self.notes) < 20:
            self.notes.append(f"{kind}: {note}")

    def attempt(self, label: object, work: Callable[[], str | None]) -> str:
        """Carry out an attempt and count how it ended.

        The work returns "refused" or "taken" (the same as None), and raises `Wrong` for a result
        that is not right. A `LaminaError` is a refusal.
        """
        begin = time.process_time()
        kind, note = self._judge(work)
        took = time.process_time() - begin
        self.slowest = max(self.slowest, took)
        if took > self.limit and kind not in FAULTS:
            kind, note = "hang", f"{took:.1f} s of CPU time"
        if ran():
            kind, note = "code run", "a file that only code of the input can have made"
        self.add(kind, f"{label}: {note}")
        return kind

    def _judge(self, work: Callable[[], str | None]) -> tuple[str, str]:
        try:
            with cpu_limit(self.limit), quiet():
                told = work()
        except Hang:
            return "hang", f"stopped after {self.limit} s of CPU time"
        except Wrong as error:
            return "wrong", str(error)
        except lm.LaminaError as error:
            line = " ".join(str(error).split())
            if 0 < len(line) <= LONGEST_LINE:
                return "refused in one line", ""
            return "wrong", f"an error of {len(line)} characters"
        except Exception:
            return "traceback", traceback.format_exc(limit=-3)
        return ("refused in one line" if told == "refused" else "taken"), ""


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise `Hang` in what takes more CPU time than this.

    Regular expressions and loops are stopped, within long calls of C code only their end is seen.
    """

    def stop(number: int, frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what thousands of attempts would warn of and log."""
    log = logging.getLogger("lamina")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    """Work in an empty folder, in which code that an input holds would leave the file "ran"."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)


def ran() -> bool:
    """Return whether code of an input left its file here, and remove that."""
    mark = Path("ran")
    if not mark.exists():
        return False
    mark.rmdir() if mark.is_dir() else mark.unlink()
    return True


def table(rows: list[Counts]) -> str:
    """Return the counts as a markdown table, the faults below it."""
    head = ["attack", "tried", *COLUMNS, "slowest, s CPU"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [row.name, row.tried, *row.numbers.values(), f"{row.slowest:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for row in rows:
        lines += [f"\n{row.name}: {note}" for note in row.notes]
    return "\n".join(lines)
