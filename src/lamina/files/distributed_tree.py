"""The nested dicts that `torch.distributed.checkpoint` saved to a folder, put together again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from .._util.sharding import is_distributed
from ..errors import StateError
from .distributed_folder import FolderReader, PlainPlanner

#: the keys and the places in lists that lead to a value
Path = tuple[Any, ...]


def read_tree(
    reader: FolderReader,
    paths: Mapping[str, Path],
    like: Callable[[Path], torch.Tensor | None] = lambda path: None,
    *,
    alone: bool = False,
) -> dict[Hashable, Any]:
    """Read saved values into nested dicts and lists.

    Args:
        reader: of the folder.
        paths: where each value lies, by the name under which it is saved.
        like: the tensor as which the one at a path is sharded, if its shape is the same.
        alone: read all of it in this process, without the others of its group.
    """
    reader.check(paths)
    saved = reader.metadata.state_dict_metadata
    flat: dict[str, Any] = {name: _room(saved[name], like(path)) for name, path in paths.items()}
    together = is_distributed() and not alone
    with warnings.catch_warnings():
        if not together:  # torch warns that it takes this for a single process
            warnings.simplefilter("ignore", UserWarning)
        planner = PlainPlanner(str(reader.folder))
        load(flat, storage_reader=reader, planner=planner, no_dist=not together)
    tree: dict[Hashable, Any] = {}
    for name, path in sorted(paths.items(), key=lambda item: _order(item[1])):
        _put(tree, path, flat[name])
    return tree


@contextmanager
def reading(folder: str) -> Iterator[None]:
    """Turn whatever a damaged folder brings about into a `StateError` that names it."""
    try:
        yield
    except StateError:
        raise
    except (Exception, CheckpointException) as error:  # damage raises whatever it looks like
        cause: BaseException = error
        if isinstance(error, CheckpointException):  # no Exception; it holds those of all processes
            cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, StateError) or not isinstance(cause, Exception):
            raise cause from None
        lines = str(cause).splitlines() or [""]
        raise StateError(
            f"{folder}: cannot be read ({type(cause).__name__}: {lines[0]}); use another "
            "checkpoint."
        ) from error


def as_state_dict(nested: Mapping[Hashable, Any]) -> dict[str, Any]:
    """Return an optimizer's part of a tree in the form of `optimizer.state_dict()`.

    Numbers stand for the parameters, and the groups hold their names. What a folder has no entry
    for was not lost on the way: it was saved so.
    """
    left = dict(nested.get("state", {}))
    state: dict[Any, Any] = {}
    groups = []
    count = 0
    for group in nested["param_groups"]:
        keys = group["params"]
        numbers = list(range(count, count + len(keys)))
        count += len(keys)
        names = {"param_names": keys} if all(isinstance(key, str) for key in keys) else {}
        groups.append({**group, **names, "params": numbers})
        pairs = zip(numbers, map(str, keys), strict=True)
        state |= {number: left.pop(key) for number, key in pairs if key in left}
    return {"state": state | left, "param_groups": groups}


def _room(saved: Any, param: torch.Tensor | None) -> torch.Tensor | None:
    """Allocate a tensor for a saved one, sharded like its parameter; None for others."""
    size = getattr(saved, "size", None)
    if size is None:
        return None
    dtype = saved.properties.dtype
    if param is not None and tuple(param.shape) == tuple(size):
        return torch.empty_like(param, dtype=dtype, requires_grad=False)
    return torch.empty(size, dtype=dtype)


def _order(path: tuple[Any, ...]) -> list[tuple[int, Any]]:
    """Return places in lists by their number."""
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
