"""The part of a checkpoint that no process holds alone: tensors, in a folder beside its file.

    step-00000123-0123456789abcdef.pt      values, and the checksum of every file of the folder
    step-00000123-0123456789abcdef.shards  what `torch.distributed.checkpoint` wrote: metadata, and
                                           a file from each process

The folder is whole before the file appears. Its layout is that of torch's own functions: the keys
"model" and "optimizer", as `get_state_dict(model, optimizer)` gives them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import LaminaError, StateError
from ..files.atomic import digest_of, sync_folder, wrap_write_errors
from ..optimizer.optimizer import Optimizer

#: the key of the checksums in a checkpoint that has a folder
SHARDS = "shards"
_PENDING = ".saving-shards"
_FOLDER = re.compile(r"step-\d{8,}-[0-9a-f]{16}\.shards", re.ASCII)
_FILE = re.compile(r"\.metadata|__(\d+)_\d+\.distcp", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


def folder_of(path: Path) -> Path:
    """Return where the shards of a checkpoint lie; the best shares them with its first name."""
    return path.with_name(path.name.replace("best-", "step-", 1)).with_suffix(".shards")


def write_shards(
    home: Path, model: nn.Module, optimizer: Optimizer, gather: Callable[[Any], Any]
) -> dict[str, str]:
    """Write the tensors of a sharded model and its optimizer; call it on every process.

    Args:
        home: the folder of the checkpoints, which all processes can write to.
        model: sharded.
        optimizer: that of the model.
        gather: joins the lists that the processes give.

    Returns:
        The SHA-256 of every file, by its name; `checkpoint.save` gives the folder its name.

    Raises:
        LaminaError: if a process cannot write.
    """
    from torch.distributed.checkpoint import FileSystemWriter, save
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import get_state_dict

    pending = home / _PENDING
    weights, state = get_state_dict(model, optimizer)
    try:
        save({"model": weights, "optimizer": state}, storage_writer=FileSystemWriter(pending))
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise LaminaError(
            f"{pending}: process {rank} cannot write its part of the checkpoint ({cause}). All "
            "processes need to write to the folder of the run; choose another with --out."
        ) from error
    return dict(gather(_digests(pending)))


def _digests(pending: Path) -> list[tuple[str, str]]:
    """Return name and SHA-256 of the files that this process wrote; the first also the metadata."""
    rank = torch.distributed.get_rank()
    found = []
    with wrap_write_errors(pending):
        for path in sorted(pending.iterdir()):
            match = _FILE.fullmatch(path.name)
            if match is not None and int(match[1] or 0) == rank:
                found.append((path.name, digest_of(path)))
        sync_folder(pending)
    return found


def begin_shards(home: Path) -> None:
    """Make room for the shards of a checkpoint; called by one process before `write_shards`."""
    with wrap_write_errors(home):
        home.mkdir(exist_ok=True)
        shutil.rmtree(home / _PENDING, ignore_errors=True)


def name_shards(path: Path) -> None:
    """Give the shards that were written last to the checkpoint that is about to appear."""
    target = folder_of(path)
    with wrap_write_errors(target):
        if target.exists():  # of the same content, by its name
            shutil.rmtree(target)
        (path.parent / _PENDING).rename(target)
        sync_folder(path.parent)


def are_whole(path: Path, content: Mapping[str, Any]) -> bool:
    """Return whether every shard of a checkpoint is there and has its checksum."""
    shards, folder = content.get(SHARDS, {}), folder_of(path)
    if not isinstance(shards, dict):
        return False
    for name, digest in shards.items():
        if not isinstance(name, str) or not _FILE.fullmatch(name):
            return False
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            return False
        try:
            if digest_of(folder / name) != digest:
                return False
        except OSError:
            return False
    return True


def with_shards(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint with whole tensors in the place of its shards.

    Raises:
        StateError: if the folder is not as `write_shards` left it.
    """
    if not content.get(SHARDS):
        return content
    from ..files.distributed_folder import FolderReader
    from ..files.distributed_tree import as_state_dict, read_tree, reading

    folder = folder_of(path)
    with reading(str(folder)):
        reader = FolderReader(str(folder))
        tree = read_tree(reader, reader.metadata.planner_data, alone=True)
        optimizer = as_state_dict(tree["optimizer"])
        return {**content, "model": tree["model"], "optimizer": optimizer}


def remove_orphans(home: Path) -> None:
    """Remove the shards of checkpoints that are gone; those of a damaged one stay beside it."""
    for folder in home.glob("step-*.shards"):
        path = folder.with_suffix(".pt")
        best = path.with_name(path.name.replace("step-", "best-", 1))
        damaged = (each.with_name(f"{each.name}.damaged") for each in (path, best))
        if _FOLDER.fullmatch(folder.name) and not any(map(Path.exists, (path, best, *damaged))):
            shutil.rmtree(folder, ignore_errors=True)


def remove_pending(home: Path) -> None:
    """Remove shards that a process was writing when it was killed."""
    shutil.rmtree(home / _PENDING, ignore_errors=True)


def missing(path: Path, content: Mapping[str, Any]) -> StateError:
    """Return the error for a checkpoint whose shards are not whole."""
    return StateError(
        f"{path}: the checkpoint is damaged: its tensors lie in {folder_of(path).name}, and "
        f"{len(content[SHARDS])} files with the checksums in the checkpoint should be there. Copy "
        "the folder again from where it came from, or use another checkpoint."
    )
