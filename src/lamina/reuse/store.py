"""Where stored outputs lie: in memory or in mapped files, up to a budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from .journal import Journal, Stored
from .shelf import OutputForm, Rows, Shelf

#: the call and the layout of the batches
Place = tuple[str, str]


class Tell(Protocol):
    """What tells the user something once."""

    def __call__(self, message: str) -> None:
        """Tell it."""


class Store:
    """The shelves of a session.

    Args:
        space: how many bytes they may take.
        folder: where they lie as files; by default they are in memory.
        tell: called with what went wrong with a file.
        preprocessing: how inputs were prepared.
        narrow: what wider outputs are rounded to.
    """

    def __init__(
        self,
        space: int,
        folder: Path | None,
        tell: Tell,
        preprocessing: str = "",
        narrow: torch.dtype | None = None,
    ) -> None:
        self.space = space
        self.narrow = narrow
        self.used = 0
        self.full = False
        #: whether it was the disk that had no room, which is told
        self.disk_is_full = False
        self.shelves: dict[Place, Shelf] = {}
        self._tell = tell
        self._journal = None if folder is None else Journal.open(folder, tell, preprocessing)

    @property
    def on_disk(self) -> bool:
        """Whether outputs are stored in files."""
        return self._journal is not None

    def shelf(self, place: Place, form: OutputForm, fingerprint: Callable[[], str]) -> Shelf:
        """Return a shelf, made if it is not there; what its files hold is taken over.

        Args:
            place: of the shelf.
            form: of the outputs.
            fingerprint: gives what identifies the weights that they were computed with.
        """
        if place in self.shelves:
            return self.shelves[place]
        widths = form.widths(self.narrow)
        shelf = Shelf(form, self.narrow)
        if self._journal is None:
            shelf.rows = [Rows(width, self._allocate) if width else None for width in widths]
        else:
            stored = self._journal.stored(place, fingerprint(), widths)
            shelf.rows = [
                Rows(width, self._mapped(stored, leaf)) if width else None
                for leaf, width in enumerate(widths)
            ]
            self._take_over(shelf, stored)
        self.shelves[place] = shelf
        return shelf

    def retain(self, wanted: Callable[[Place], bool]) -> None:
        """Drop all other shelves, with their files."""
        for place in [place for place in self.shelves if not wanted(place)]:
            self._forget(place)
            self.full = False

    def close(self) -> None:
        """Write what is not written yet, and let go of the folder."""
        if self._journal is not None:
            self._journal.close()

    def _forget(self, place: Place) -> None:
        self.used -= self.shelves.pop(place).size
        if self._journal is not None:
            self._journal.forget(place)

    def _allocate(self, _piece: int, rows: int, width: int) -> torch.Tensor | None:
        size = rows * width
        if self.used + size > self.space:
            self.full = True
            return None
        self.used += size
        with torch.inference_mode(False):
            return torch.empty(rows, width, dtype=torch.uint8)

    def _mapped(self, stored: Stored, leaf: int) -> Callable[[int, int, int], torch.Tensor | None]:
        def allocate(piece: int, rows: int, width: int) -> torch.Tensor | None:
            size = rows * width
            if self.used + size > self.space:
                self.full = True
                return None
            try:
                mapped = stored.piece(leaf, piece, size)
            except OSError as error:
                self.full = self.disk_is_full = True
                self._tell(
                    f"Nothing more is stored: {stored.folder} cannot take another "
                    f"{size / 2**20:.0f} MiB ({error.strerror or error}). What is stored goes on "
                    "to be reused. Free some space, or choose another folder."
                )
                return None
            self.used += size
            return mapped.view(rows, width)

        return allocate

    def _take_over(self, shelf: Shelf, stored: Stored) -> None:
        if stored.slots and not shelf.grow(len(stored.slots)):
            stored.clear()
        shelf.slots = dict(stored.slots)
        shelf.sums = stored.sums
        shelf.unchecked = set(stored.slots.values())
        shelf.written = stored.append

        def damaged() -> None:
            stored.clear()
            self._tell(
                f"{stored.folder}: stored outputs of {stored.key!r} are damaged (a checksum "
                "differs). They are not used, but computed again."
            )

        shelf.damaged = damaged
