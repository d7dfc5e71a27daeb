"""Reading an optimizer's state from `torch.distributed.checkpoint`, whatever was frozen when."""

from __future__ import annotations

import os
import warnings
from collections.abc import Hashable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from .errors import StateError
from .state import LoadReport

if TYPE_CHECKING:
    from .optimizer import Optimizer


def load_distributed(
    optimizer: Optimizer, checkpoint_id: str | os.PathLike[str], key: str = "optimizer"
) -> LoadReport:
    """Take over the state of an optimizer that `torch.distributed.checkpoint` saved to a folder.

    Saved by any number of processes, loaded by any other, by parameter name as in
    `load_state_dict`. Torch's own way back, `set_optimizer_state_dict`, reads only into tensors
    that exist already and leaves out what is frozen at that moment; after a thaw, that loses state.

    Args:
        optimizer: built from a plan, on the model that it trains; call it on every process.
        checkpoint_id: the folder.
        key: where the dict of `get_optimizer_state_dict(model, optimizer)` lies in what was saved.

    Returns:
        What was kept, missing and dropped; the same as `optimizer.last_load`.

    Raises:
        StateError: if there is no such state in the folder, or it does not fit; nothing changed.

    Example:
        >>> from torch.distributed.checkpoint import save
        >>> from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
        >>> state = {"optimizer": get_optimizer_state_dict(model, optimizer)}  # doctest: +SKIP
        >>> save(state, checkpoint_id="step-100")  # doctest: +SKIP
        >>> load_distributed(optimizer, "step-100")  # doctest: +SKIP
    """
    optimizer.load_state_dict(_read(_by_name(optimizer), os.fspath(checkpoint_id), key))
    assert optimizer.last_load is not None
    return optimizer.last_load


def _read(named: Mapping[str, torch.Tensor], folder: str, key: str) -> dict[str, Any]:
    """The state dict in a folder, its tensors sharded as the parameters of these names are."""
    # Imported here: it costs a second, and only those who save this way need it.
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(folder)
    try:
        metadata = reader.read_metadata()
    except FileNotFoundError:
        raise StateError(
            f"{folder}: there is no checkpoint of torch.distributed.checkpoint; check the path."
        ) from None
    places: dict[str, tuple[Any, ...]] = metadata.planner_data or {}
    paths = {name: path for name, path in places.items() if path[0] == key}
    if not any(path[1:2] == ("param_groups",) for path in paths.values()):
        found = ", ".join(sorted({str(path[0]) for path in places.values()}))
        raise StateError(
            f"{folder}: there is no optimizer state under {key!r}, only {found}; pass key=, the "
            "name under which what get_optimizer_state_dict gave was saved."
        )
    flat: dict[str, Any] = {}
    for name, path in paths.items():
        owner = named.get(path[2]) if path[1] == "state" else None
        flat[name] = _room(metadata.state_dict_metadata[name], owner)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    with warnings.catch_warnings():
        if not distributed:  # torch warns that it takes this for a single process, which it is
            warnings.simplefilter("ignore", UserWarning)
        load(flat, storage_reader=reader, no_dist=not distributed)
    nested: dict[Hashable, Any] = {}
    for name, path in sorted(paths.items(), key=lambda item: _order(item[1])):
        _put(nested, path[1:], flat[name])
    return {"state": nested.get("state", {}), "param_groups": nested["param_groups"]}


def _by_name(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    return {
        name: param
        for cell, group in zip(optimizer.resolved.cells, optimizer.param_groups, strict=True)
        for info, param in zip(cell.parameters, group["params"], strict=True)
        for name in info.names
    }


def _room(saved: Any, param: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor for what was saved, sharded as its parameter is; None for what is no tensor."""
    size = getattr(saved, "size", None)
    if size is None:
        return None
    dtype = saved.properties.dtype
    if param is not None and tuple(param.shape) == tuple(size):
        return torch.empty_like(param, dtype=dtype, requires_grad=False)
    return torch.empty(size, dtype=dtype)


def _order(path: tuple[Any, ...]) -> list[tuple[int, Any]]:
    """Places in lists by their number."""
    return [(0, part) if isinstance(part, int) else (1, str(part)) for part in path]


def _put(nested: Any, path: tuple[Any, ...], value: Any) -> None:
    """Set what lies at a path of keys and of places in lists, which come in order."""
    for part, following in pairwise(path):
        new: Any = [] if isinstance(following, int) else {}
        if isinstance(part, int) and part == len(nested):
            nested.append(new)
        elif not isinstance(part, int):
            nested.setdefault(part, new)
        nested = nested[part]
    last = path[-1]
    if isinstance(last, int):
        nested.append(value)
    else:
        nested[last] = value
