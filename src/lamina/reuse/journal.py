"""Stored outputs in a folder: mapped files of rows, and a journal that says whose they are.

A line is added to the journal after its rows were written, so a run that is killed loses at most
the last one. Nothing in the folder is trusted: every row has a checksum, which is compared before
its first use in another process, and files are mapped as bytes.
"""

from __future__ import annotations

import json
import os
import weakref
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import LaminaError, shortened

try:
    import fcntl
except ImportError:  # on Windows, where a second run in the folder is not noticed
    fcntl = None  # type: ignore[assignment]

_NAME = "reuse.jsonl"
_FORMAT = 2


@dataclass
class Stored:
    """What the folder holds of one shelf: the slot and the checksums of each example."""

    journal: Journal
    number: int
    key: str
    layout: str
    fingerprint: str
    widths: list[int]
    slots: dict[bytes, int] = field(default_factory=dict)
    sums: dict[int, list[int]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder of the journal."""
        return self.journal.folder

    def path(self, leaf: int, piece: int) -> Path:
        """Return the file of a piece of memory."""
        return self.folder / f"{self.number}-{leaf}-{piece}.rows"

    def piece(self, leaf: int, piece: int, size: int) -> torch.Tensor:
        """Return a file as bytes in memory, made with all its space if it is not there.

        Raises:
            OSError: if there is no room for it.
        """
        path = self.path(leaf, piece)
        if not path.exists() or path.stat().st_size != size:
            try:
                with path.open("wb") as file:
                    reserve(file, size)
            except OSError:
                with suppress(OSError):
                    path.unlink()
                raise
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)

    def append(self, examples: Sequence[bytes], first: int, sums: Sequence[list[int]]) -> None:
        """Note rows that were written."""
        line = {
            "shelf": self.number,
            "first": first,
            "examples": [one.hex() for one in examples],
            "sums": list(sums),
        }
        self.journal.write(line)

    def clear(self) -> None:
        """Forget the rows."""
        self.slots.clear()
        self.sums.clear()
        self.journal.write({"cleared": self.number})

    def remove_files(self) -> None:
        """Remove its files."""
        for path in self.folder.glob(f"{self.number}-*.rows"):
            with suppress(OSError):
                path.unlink()


class Journal:
    """The journal of a folder, held by one process.

    Args:
        folder: where it lies.
        file: opened to append.
        tell: called with what is wrong with it.
    """

    def __init__(self, folder: Path, file: BinaryIO, tell: Any, preprocessing: str = "") -> None:
        self.folder = folder
        self._preprocessing = preprocessing
        self._file = file
        self._tell = tell
        self._shelves: dict[int, Stored] = {}
        weakref.finalize(self, file.close)  # also where nobody calls `close`
        before = self._read()
        if before != preprocessing:
            self._begin_anew(before)

    @classmethod
    def open(cls, folder: Path, tell: Any, preprocessing: str = "") -> Journal | None:
        """Open the journal of a folder; None, with a word why, if that cannot be done.

        Args:
            folder: where it lies; it is made if it is not there.
            tell: called with what is wrong.
            preprocessing: how inputs were prepared; what was stored under another is removed.
        """
        file = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / _NAME).open("a+b", buffering=0)
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            assert file is not None
            file.close()
            tell(
                f"{folder}: another process stores its outputs there. This one keeps its own in "
                "memory; give each run a folder of its own."
            )
            return None
        except OSError as error:
            tell(
                f"{folder}: cannot be written ({error.strerror or error}). Outputs are kept in "
                "memory instead; choose another folder."
            )
            return None
        return cls(folder, file, tell, preprocessing)

    def stored(self, place: tuple[str, str], fingerprint: str, widths: list[int]) -> Stored:
        """Return what is there of a shelf; what belongs to other weights is removed."""
        key, layout = place
        for number, found in list(self._shelves.items()):
            if found.key != key:
                continue
            if found.fingerprint != fingerprint or (
                found.layout == layout and found.widths != widths
            ):
                self._tell(
                    f"{self.folder}: what is stored there of {key!r} was computed with other "
                    "weights or by another model. It is removed, and computed again."
                )
                self._remove(number)
            elif found.layout == layout:
                return found
        number = max(self._shelves, default=-1) + 1
        made = Stored(self, number, key, layout, fingerprint, widths)
        made.remove_files()
        self._shelves[number] = made
        self.write(
            {
                "format": _FORMAT,
                "shelf": number,
                "key": key,
                "layout": layout,
                "fingerprint": fingerprint,
                "widths": widths,
            }
        )
        return made

    def forget(self, place: tuple[str, str]) -> None:
        """Remove what is stored of a shelf."""
        for number, found in list(self._shelves.items()):
            if (found.key, found.layout) == place:
                self._remove(number)

    def write(self, line: dict[str, Any]) -> None:
        """Add a line; without room for it, the rows are lost to a later process only."""
        with suppress(OSError):
            self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        """Let go of the folder."""
        self._file.close()

    def _begin_anew(self, before: str) -> None:
        """Remove what was prepared in another way, if there is any, and note how it is now."""
        if self._shelves:
            self._tell(
                f"{self.folder}: what is stored there was prepared with "
                f"preprocessing={shortened(repr(before))}, and this run has "
                f"{shortened(repr(self._preprocessing))}. It is removed, and computed again; give "
                "another folder to keep both."
            )
        for number in list(self._shelves):
            self._remove(number)
        self.write({"preprocessing": self._preprocessing})

    def _remove(self, number: int) -> None:
        self._shelves.pop(number).remove_files()
        self.write({"removed": number})

    def _read(self) -> str:
        """Read the journal up to the first line that is not whole; return its preprocessing."""
        preprocessing = ""
        self._file.seek(0)
        text = self._file.read()
        good = 0
        try:
            for line in text.splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break  # the process was killed while it wrote this
                entry = json.loads(line)
                if "preprocessing" in entry:
                    preprocessing = str(entry["preprocessing"])
                else:
                    self._take(entry)
                good += len(line)
        except (ValueError, KeyError, TypeError, AttributeError, LaminaError, RecursionError):
            self._tell(
                f"{self.folder / _NAME}: is damaged at byte {good}. What it lists from there on is "
                "computed again."
            )
        if good < len(text):
            self._file.truncate(good)
        return preprocessing

    def _take(self, line: dict[str, Any]) -> None:
        if "removed" in line:
            self._shelves.pop(_whole(line["removed"]), None)
            return
        if "cleared" in line:
            self._shelves[_whole(line["cleared"])].slots.clear()
            return
        number = _whole(line["shelf"])
        if "key" in line:
            if line["format"] != _FORMAT:
                raise LaminaError("another format")
            widths = [_whole(width) for width in line["widths"]]
            key, layout, weights = (str(line[name]) for name in ("key", "layout", "fingerprint"))
            self._shelves[number] = Stored(self, number, key, layout, weights, widths)
            return
        shelf = self._shelves[number]
        first = _whole(line["first"])
        pairs = zip(line["examples"], line["sums"], strict=True)
        for slot, (example, sums) in enumerate(pairs, start=first):
            if slot != len(shelf.slots) or len(sums) != sum(map(bool, shelf.widths)):
                raise LaminaError("a gap")
            shelf.slots[bytes.fromhex(example)] = slot
            shelf.sums[slot] = [_whole(each) for each in sums]


def checksum(row: torch.Tensor) -> int:
    """Return the CRC-32 of a row of bytes."""
    return zlib.crc32(row.numpy().tobytes())


def reserve(file: BinaryIO, size: int) -> None:
    """Give a file its whole space now: a mapped file without it would end the process later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    block = bytes(2**20)
    for start in range(0, size, len(block)):
        file.write(block[: size - start])


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise LaminaError("not a whole number")
    return value
