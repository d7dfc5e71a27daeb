"""Taking single, named files out of a zip or tar archive, safely.

Only the members asked for are read, never the whole archive, and the files they become are named
by the caller, never by the archive. A member that is not a plain file (a link, a device, a
folder), that points outside the archive or that is larger than allowed is refused.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from lamina.errors import TaskError

MAX_BYTES = 512 * 2**20
DAMAGE = (EOFError, gzip.BadGzipFile, tarfile.TarError, zipfile.BadZipFile, zlib.error)
NESTED = "!"  # "outer.tar.gz!inner.txt" is a file of an archive inside the archive


def extract(archive: Path, member: str, target: Path) -> None:
    """Write one member of an archive to `target`, through to the disk."""
    outer, _, inner = member.partition(NESTED)
    try:
        if inner:
            _extract_nested(archive, outer, inner, target)
        else:
            with open_member(archive, outer) as source:
                _copy(source, target, member)
    except DAMAGE as error:
        raise TaskError(
            f"The archive {archive.name} cannot be read at {member!r} "
            f"({' '.join(str(error).split())}). It may be damaged: run the command again "
            "to fetch it anew."
        ) from error


def _extract_nested(archive: Path, outer: str, inner: str, target: Path) -> None:
    """Take the inner archive out beside the target, then its member out of that."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        between = Path(folder) / PurePosixPath(outer).name
        extract(archive, outer, between)
        extract(between, inner, target)


@contextmanager
def open_member(archive: Path, name: str) -> Iterator[IO[bytes]]:
    """A plain file of a zip or tar archive, open for reading."""
    _refuse_unsafe_name(archive, name)
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            info = _zip_info(zipped, archive, name)
            with zipped.open(info) as source:
                yield source
    else:
        with tarfile.open(archive) as tar:
            yield _tar_source(tar, archive, name)


def _refuse_unsafe_name(archive: Path, name: str) -> None:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise TaskError(
            f"The member {name!r} of {archive.name} was refused: it points outside the archive. "
            "Name a file by its plain path inside the archive."
        )


def _zip_info(zipped: zipfile.ZipFile, archive: Path, name: str) -> zipfile.ZipInfo:
    try:
        info = zipped.getinfo(name)
    except KeyError:
        raise _absent(archive, name) from None
    is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
    if info.is_dir() or is_link:
        raise _not_a_file(archive, name)
    return info


def _tar_source(tar: tarfile.TarFile, archive: Path, name: str) -> IO[bytes]:
    try:
        info = tar.getmember(name)
    except KeyError:
        raise _absent(archive, name) from None
    source = tar.extractfile(info) if info.isreg() else None
    if source is None:
        raise _not_a_file(archive, name)
    return source


def _absent(archive: Path, name: str) -> TaskError:
    return TaskError(
        f"The archive {archive.name} has no member {name!r}. "
        "It is not the file that was expected: check the pinned version."
    )


def _not_a_file(archive: Path, name: str) -> TaskError:
    return TaskError(
        f"The member {name!r} of {archive.name} was refused: it is a link or a folder, "
        "not a plain file. Do not use this archive."
    )


def _copy(source: IO[bytes], target: Path, member: str) -> None:
    """Copy at most MAX_BYTES and flush to the disk."""
    with target.open("wb") as sink:
        shutil.copyfileobj(_Limited(source, member), sink, 2**20)
        sink.flush()
        os.fsync(sink.fileno())


class _Limited:
    """A reader that refuses to give more than MAX_BYTES."""

    def __init__(self, source: IO[bytes], member: str) -> None:
        self.source, self.member, self.left = source, member, MAX_BYTES

    def read(self, size: int = -1) -> bytes:
        chunk = self.source.read(size)
        self.left -= len(chunk)
        if self.left < 0:
            raise TaskError(
                f"The archive member {self.member!r} unpacks to more than "
                f"{MAX_BYTES // 2**20} MB. Do not use this archive."
            )
        return chunk
