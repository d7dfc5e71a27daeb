"""Files that are whole or absent, whenever the process or the machine stops."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import LaminaError, StateError


@contextmanager
def wrap_write_errors(path: Path) -> Iterator[None]:
    """Turn a failing disk into an error that names the file."""
    try:
        yield
    except OSError as error:
        another = "choose another folder (for lamina run, with --out)."
        advice = f"Free some space, or {another}"
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            advice = f"Make its folder first, or {another}"
        elif isinstance(error, PermissionError):
            advice = another.capitalize()
        raise LaminaError(
            f"{path}: cannot be written ({error.strerror or error}). {advice}"
        ) from error


@contextmanager
def wrap_read_errors(path: Path) -> Iterator[None]:
    """Turn a path or a file that cannot be read into an error that names it."""
    try:
        yield
    except OSError as error:
        raise StateError(
            f"{path}: cannot be read ({error.strerror or error}). Check the path."
        ) from error


class Hashing(io.BufferedIOBase):
    """Writes to a file and takes the SHA-256 of what passes through.

    Args:
        file: where the bytes go.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes; a failure is kept, since `torch.save` shows one of its own instead."""
        try:
            self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self.sha256.update(data)
        return len(data)


@contextmanager
def atomic(path: Path, named: Callable[[str], str] | None = None) -> Iterator[Hashing]:
    """Write a file that appears complete or not at all: temporary file, fsync, rename.

    Args:
        path: the file, replaced if it exists; what was there stays until the new one is durable.
        named: its name instead, given the SHA-256 of the content.

    Raises:
        LaminaError: if it cannot be written; nothing is left behind then.
    """
    with wrap_write_errors(path):
        temporary = path.parent / f".{path.name}-{secrets.token_hex(8)}"
        try:
            with temporary.open("xb") as file:
                hashing = Hashing(file)
                try:
                    yield hashing
                except RuntimeError:
                    if hashing.failure is not None:
                        raise hashing.failure from None
                    raise
                file.flush()
                os.fsync(file.fileno())
            name = named(hashing.sha256.hexdigest()) if named else path.name
            temporary.replace(path.parent / name)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove what `atomic` could not clear away when it was killed while writing a file."""
    for temporary in path.parent.glob(f".{path.name}-*"):
        temporary.unlink(missing_ok=True)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename durable, where folders can be opened (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
