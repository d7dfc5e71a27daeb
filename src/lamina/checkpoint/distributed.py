"""Reading an optimizer's state from `torch.distributed.checkpoint`, whatever was frozen when."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import StateError
from ..model.parameters import clean_names, collect
from ..optimizer.optimizer import Optimizer
from ..state.match import check_renamed, renamed_cleanly, renamed_to
from ..state.report import LoadReport

Path = tuple[Any, ...]


def load_distributed(
    optimizer: Optimizer,
    checkpoint_id: str | os.PathLike[str],
    key: str = "optimizer",
    *,
    strict: bool = False,
    renamed: Mapping[str, str | None] | None = None,
) -> LoadReport:
    """Take over the state of an optimizer that `torch.distributed.checkpoint` saved to a folder.

    Saved by any number of processes, loaded by any other, by parameter name as in
    `load_state_dict`. Torch's own way back, `set_optimizer_state_dict`, reads only into tensors
    that exist already and leaves out what is frozen at that moment; after a thaw, that loses state.
    For a run of another length, build with `resume=read_distributed(...)` and `extend=`.

    Args:
        optimizer: built from a plan, on the model that it trains; call it on every process.
        checkpoint_id: the folder; no code in it is run, so it may come from anybody.
        key: where the dict of `get_optimizer_state_dict(model, optimizer)` lies in what was saved.
        strict: as in `load_state_dict`.
        renamed: as in `load_state_dict`.

    Returns:
        What was kept, new, restarted and dropped; the same as `optimizer.last_load`.

    Raises:
        StateError: if the folder cannot be read, there is no such state in it, or the state does
            not fit; nothing changed.

    Example:
        >>> from torch.distributed.checkpoint import save
        >>> from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
        >>> state = {"optimizer": get_optimizer_state_dict(model, optimizer)}  # doctest: +SKIP
        >>> save(state, checkpoint_id="step-100")  # doctest: +SKIP
        >>> load_distributed(optimizer, "step-100")  # doctest: +SKIP
    """
    if not isinstance(optimizer, Optimizer):
        raise StateError(
            f"load_distributed was given a {type(optimizer).__name__}; it needs an optimizer that "
            "plan.build made, which knows the names of its parameters."
        )
    check_renamed(renamed or {})
    optimizer._follow_model()
    state = _read(_by_name(optimizer), os.fspath(checkpoint_id), key, renamed or {})
    optimizer.load_state_dict(state, strict=strict, renamed=renamed)
    assert optimizer.last_load is not None
    return optimizer.last_load


def read_distributed(
    model: nn.Module, checkpoint_id: str | os.PathLike[str], key: str = "optimizer"
) -> dict[str, Any]:
    """Return the state of an optimizer that `torch.distributed.checkpoint` saved, to go on from.

    As `optimizer.state_dict()` gave it, for `plan.build(model, resume=..., extend=...)`, and for
    `plan.preview`.

    Args:
        model: the model to train, sharded as it will be; call it on every process.
        checkpoint_id: the folder; no code in it is run, so it may come from anybody.
        key: where the dict of `get_optimizer_state_dict(model, optimizer)` lies in what was saved.

    Returns:
        The state, its tensors sharded as the parameters of the same names.

    Raises:
        StateError: if the folder cannot be read, or there is no such state in it.

    Example:
        >>> state = read_distributed(model, "step-100")  # doctest: +SKIP
        >>> plan.build(model, steps=200, resume=state, extend="hold")  # doctest: +SKIP
    """
    named = {name: item.tensor for item in collect(model) for name in item.info.names}
    return _read(named, os.fspath(checkpoint_id), key, {})


def _read(
    named: Mapping[str, torch.Tensor],
    folder: str,
    key: str,
    renamed: Mapping[str, str | None],
) -> dict[str, Any]:
    """Read a state dict from a folder; its tensors are sharded like the parameters."""
    # Imported here: it costs a second, and only those who save this way need it.
    from ..files.distributed_folder import FolderReader
    from ..files.distributed_tree import as_state_dict, read_tree, reading

    with reading(folder):
        reader = FolderReader(folder)
        paths = _paths(reader.metadata.planner_data, folder, key)
        saved = dict.fromkeys(path[2] for path in paths.values() if _of_state(path))
        owners = _owners([*saved], named, renamed)
        tree = read_tree(
            reader, paths, lambda path: owners.get(path[2]) if _of_state(path) else None
        )
        return as_state_dict(tree[key])


def _paths(places: Mapping[str, Path], folder: str, key: str) -> dict[str, Path]:
    """Return where each saved value lies, of those under the key."""
    paths = {name: path for name, path in places.items() if path[0] == key}
    if not any(path[1:2] == ("param_groups",) for path in paths.values()):
        found = ", ".join(sorted({str(path[0]) for path in places.values()})) or "nothing"
        raise StateError(
            f"{folder}: there is no optimizer state under {key!r}, only {found}; pass key=, the "
            "name under which what get_optimizer_state_dict gave was saved."
        )
    return paths


def _of_state(path: Path) -> bool:
    """Return whether a path leads into the state of a parameter (its third part)."""
    return len(path) > 3 and path[1] == "state"


def _owners(
    saved: list[str], named: Mapping[str, torch.Tensor], renamed: Mapping[str, str | None]
) -> dict[str, torch.Tensor]:
    """Return the parameter of each saved name, by its name now."""
    cleaned = clean_names(saved)
    renamed = renamed_cleanly(renamed, cleaned.values())
    now = {name: renamed_to(clean, renamed) for name, clean in cleaned.items()}
    return {name: named[target] for name, target in now.items() if target and target in named}


def _by_name(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    return {
        name: param
        for cell, group in zip(optimizer.resolved.cells, optimizer.param_groups, strict=True)
        for info, param in zip(cell.parameters, group["params"], strict=True)
        for name in info.names
    }
