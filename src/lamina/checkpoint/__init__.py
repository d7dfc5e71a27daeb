"""Checkpoints: files that verify themselves, and the folder that holds the last ones and the best.

    step-00000123-0123456789abcdef.pt     the state after step 123
    best-00000100-fedcba9876543210.pt     the best so far: another name of the same bytes
    step-00000123-0123456789abcdef.shards its tensors, where processes share them (see `sharded`)

The name ends in the first 16 digits of the content's SHA-256, as torch.hub names its files, so that
a file needs no manifest to be checked, and a name never stands for two contents. A file appears
when it is whole, under a name that was not there before; older ones go only after that.

Plans are code; checkpoints hold only state: plain values and tensors, which
`torch.load(path, weights_only=True)` reads without running anything.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from ..errors import StateError
from ..files.archives import load_plain
from ..files.atomic import (
    atomic,
    digest_of,
    remove_leftovers,
    sync_folder,
    wrap_read_errors,
    wrap_write_errors,
)
from ..files.plain import check_given, told_deep
from .sharded import (
    are_whole,
    missing,
    name_shards,
    remove_orphans,
    remove_pending,
    with_shards,
)

#: where a run keeps its checkpoints
FOLDER = "checkpoints"
#: grows when older versions of lamina could no longer read what is written
FORMAT = 1
_NAME = re.compile(r"(step|best)-(\d{8,})-([0-9a-f]{16})\.pt", re.ASCII)
#: how often a folder is listed again from which all that was listed went meanwhile
_TRIES = 10


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that is whole, what it holds, and damaged ones that are newer."""

    path: Path
    content: dict[str, Any]
    damaged: tuple[Path, ...] = ()


def save(
    folder: str | os.PathLike[str], step: int, content: Mapping[str, Any], *, sharded: bool = False
) -> Path:
    """Write a checkpoint, durable when this returns.

    Args:
        folder: where; it is made if its parent exists.
        step: optimizer steps taken, for the name.
        content: plain values, tensors, and dicts, lists and tuples of them.
        sharded: whether `write_shards` has written tensors beside it, whose checksums it holds.

    Returns:
        The path of the file.

    Raises:
        LaminaError: if the disk does not take it; other checkpoints are as they were.
        StateError: if something in it could not be read back safely.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> path = save(folder, 7, {"clock": 7})
        >>> newest(folder).content["clock"]
        7
    """
    check_given(step, content)
    home = Path(folder)
    with wrap_write_errors(home):
        if not home.is_dir():
            home.mkdir()
            sync_folder(home.parent)

    def named(digest: str) -> str:
        return f"step-{step:08d}-{digest[:16]}.pt"

    def placed(digest: str) -> str:
        if sharded:  # first, so that no file is there without its shards
            name_shards(home / named(digest))
        return named(digest)

    with told_deep("content"), atomic(home / "saving", placed) as file:
        torch.save({"format": FORMAT, **content}, cast("IO[bytes]", file))
    return home / named(file.sha256.hexdigest())


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a checkpoint holds, with its tensors on the CPU.

    Raises:
        StateError: if it is damaged, holds more than state, or is of a newer format.
    """
    path = Path(path)
    if is_whole(path) is False:
        raise StateError(
            f"{path}: the checkpoint is damaged: its content does not have the checksum in its "
            "name. Use another one, or copy it again from where it came from."
        )
    content = _opened(path)
    if not are_whole(path, content):
        raise missing(path, content)
    return with_shards(path, content)


def _opened(path: Path) -> dict[str, Any]:
    """Read a checkpoint whose checksum is right, or that has none in its name."""
    content = load_safely(path)
    version = content.get("format") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise StateError(
            f"{path}: this is a torch file, but not a checkpoint of lamina (it has no format "
            "number); `lamina inspect` says what it holds."
        )
    if version > FORMAT:
        raise StateError(
            f"{path}: the checkpoint has format {version}, and this version of lamina reads up to "
            f"{FORMAT}; install the version that wrote it, or a newer one."
        )
    return dict(content)


def load_safely(path: Path) -> Any:
    """Load tensors and plain values only; raise `StateError` for anything else."""
    with wrap_read_errors(path), path.open("rb") as file:
        return load_plain(file, path.stat().st_size, str(path), path)


def is_whole(path: Path) -> bool | None:
    """Return whether the content has the checksum in the name; None if the name holds none."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    with wrap_read_errors(path):
        return digest_of(path).startswith(match[3])


def _is_usable(path: Path) -> bool:
    """Return whether a checkpoint is a file that can be read and is whole, without its shards."""
    try:
        return path.is_file() and bool(is_whole(path))
    except (OSError, StateError):
        return False


def _is_complete(path: Path) -> bool:
    """Return whether a checkpoint is whole, and its shards too."""
    return _is_usable(path) and are_whole(path, _opened(path))


def candidates(folder: str | os.PathLike[str]) -> list[Path]:
    """List the checkpoints of a folder by their names, the newest first.

    The best has two names, of which "step" comes first: copied apart, one may be whole and the
    other not.
    """
    home = Path(folder)
    with wrap_read_errors(home):
        listed = [*home.iterdir()] if home.is_dir() else []
    matches = [(path, _NAME.fullmatch(path.name)) for path in listed]
    found = [(int(m[2]), _changed(path), m[1], path) for path, m in matches if m is not None]
    return [order[-1] for order in sorted(found, reverse=True)]


def _changed(path: Path) -> int:
    """Return when a file was written; 0 if it is gone by now."""
    try:
        return path.lstat().st_mtime_ns
    except OSError:
        return 0


def newest(folder: str | os.PathLike[str]) -> Found:
    """Read the newest checkpoint of a folder that can be read and whose checksum is right.

    Raises:
        StateError: if there is none, naming those that are damaged.
    """
    for _ in range(_TRIES):
        listed = candidates(folder)
        damaged: list[Path] = []
        for path in listed:
            if any(_is_same(path, other) for other in damaged):
                continue  # the best is another name of it
            if _is_usable(path):
                try:
                    content = _opened(path)
                    if are_whole(path, content):
                        return Found(path, with_shards(path, content), tuple(damaged))
                    damaged.append(path)
                except StateError:
                    if os.path.lexists(path):
                        raise
            elif os.path.lexists(path):
                damaged.append(path)
        if all(map(os.path.lexists, listed)):
            break  # else a run that goes on has written newer ones meanwhile
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise StateError(
            f"{folder}: no checkpoint is whole; {names} cannot be read, or the content does not "
            "have the checksum in the name. Copy them again from where they came from, or begin a "
            "new run."
        )
    raise StateError(f"{folder}: there is no checkpoint here (step-...-....pt).")


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise StateError(f"{path}: not the name of a checkpoint (step-...-....pt).")
    return int(match[2])


def mark_best(path: str | os.PathLike[str]) -> None:
    """Give a checkpoint its second name; the best until now goes after that."""
    path = Path(path)
    target = path.with_name(path.name.replace("step-", "best-", 1))
    with wrap_write_errors(target):
        if not target.exists():
            try:
                os.link(path, target)
            except OSError:  # a file system without hard links
                with atomic(target) as copy, path.open("rb") as original:
                    shutil.copyfileobj(original, copy)
        sync_folder(path.parent)
        for other in path.parent.glob("best-*.pt"):
            if _NAME.fullmatch(other.name) and other != target and not other.is_dir():
                other.unlink(missing_ok=True)
        remove_orphans(path.parent)


def prune(folder: str | os.PathLike[str], keep: int, newest: str | os.PathLike[str]) -> None:
    """Remove all but the last checkpoints and the best.

    Args:
        folder: that of the checkpoints.
        keep: how many to keep, `newest` among them.
        newest: the one that was just saved.
    """
    if keep < 1:
        raise StateError(f"checkpoint.prune was given keep={keep}; expected at least 1.")
    home, last = Path(folder), Path(newest)
    with wrap_write_errors(home):
        files = [path for path in home.glob("step-*.pt") if _NAME.fullmatch(path.name)]
        files = [path for path in files if path.is_file()]  # of others nothing can be read
        files.sort(key=lambda path: (path.name == last.name, step_of(path), _changed(path)))
        for old in files[:-keep]:
            old.unlink(missing_ok=True)
        remove_orphans(home)


def tidy(folder: Path, damaged: Sequence[Path]) -> None:
    """Rename damaged files and remove unfinished ones before a run continues."""
    with wrap_write_errors(folder):
        for path in damaged:
            for name in {path.name, path.name.replace("step-", "best-", 1)}:
                each = path.with_name(name)
                if os.path.lexists(each) and not _is_complete(each):
                    each.rename(each.with_name(f"{each.name}.damaged"))
        remove_orphans(folder)
        remove_pending(folder)
        for name in ("saving", "best-*"):
            remove_leftovers(folder / name)
