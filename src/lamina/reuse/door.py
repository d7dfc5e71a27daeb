"""`lamina.reuse`: the entry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._util.sharding import is_flattened, is_sharded
from ..errors import PlanError
from ..optimizer.optimizer import Optimizer
from ..optimizer.wrapped import unwrap
from .copies import compiled_paths
from .options import check_options, parse_dtype, parse_space
from .session import Reuse


def reuse(
    model: nn.Module,
    optimizer: Any,
    *,
    space: int | str = "2 GB",
    folder: str | os.PathLike[str] | None = None,
    debug: float = 0.0,
    preprocessing: str = "",
    store_dtype: str | torch.dtype | None = None,
) -> Reuse:
    """Compute what is frozen once per example, and reuse its outputs with the same bits.

    A training step of a model of which a part is frozen computes `loss(trained(frozen(x)))`, and
    `frozen(x)` is the same in every epoch. From now on every forward pass of the model stores the
    outputs of frozen modules that something else reads, and replays them when the same examples
    come again. What may differ from pass to pass is left alone (see docs/how-to/reuse.md).

    Args:
        model: the model, or the module inside of a wrapper for several processes.
        optimizer: built by `Plan.build` for it, or a wrapper of that.
        space: how much may be stored: bytes, or a text such as "500 MB" or "2 GiB".
        folder: where to store it as files, so that a later process with the same weights can go
            on; by default in memory. Each process needs a folder of its own.
        debug: the share of the replayed calls that are made all the same, to compare bits.
        preprocessing: a text that says how inputs were prepared before they became tensors; what
            is stored under another one is removed, with a word about it.
        store_dtype: "bfloat16" rounds wider outputs where they are stored, for half the space; then
            results have other bits than without reuse. By default nothing is rounded.

    Returns:
        What is reused: `counts`, `refused`, `preview(...)`, `close()`. It may be used in `with`.

    Raises:
        PlanError: if the model cannot be followed, or an argument is not what is expected.

    Example:
        >>> import torch, lamina as lm
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> rules = [lm.Rule("0.*", frozen=True)]
        >>> optimizer = lm.Plan(lm.SGD, lr=0.1, rules=rules).build(model)
        >>> x = torch.randn(16, 4)
        >>> with reuse(model, optimizer) as reused:
        ...     for epoch in range(3):
        ...         optimizer.zero_grad()
        ...         model(x).square().mean().backward()
        ...         optimizer.step()
        >>> reused.counts
        {'replayed': 2, 'skipped': 0, 'stored': 16}

    References:
        Brock et al., "FreezeOut" (arXiv:1706.04983): frozen layers are left out of the backward
        pass; the forward pass, which is reused here, is still made. Alain & Bengio
        (arXiv:1610.01644): linear probes on the outputs of layers that do not train.
    """
    check_options(space, debug, preprocessing, store_dtype, folder)
    _check_model(model)
    inner = _unwrapped(optimizer)
    place = None if folder is None else Path(folder)
    amount, narrow = parse_space(space), parse_dtype(store_dtype)
    return Reuse(model, inner, amount, place, debug, preprocessing, narrow)


def _unwrapped(optimizer: Any) -> Optimizer:
    """Return the optimizer under a plan; an error begins with what was called."""
    try:
        return unwrap(optimizer)
    except PlanError as error:
        raise PlanError(f"reuse: {error}") from error


def _check_model(model: Any) -> None:
    """Raise `PlanError` for what is no model, or one whose passes cannot be followed."""
    if not isinstance(model, nn.Module):
        raise PlanError(
            f"reuse: a model of type {type(model).__name__} was given; expected a torch.nn.Module."
        )
    if type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
        raise PlanError(
            "reuse: a model in a wrapper for several processes was given. Give the module inside: "
            "lamina.reuse(model.module, optimizer)."
        )
    if "" in compiled_paths(model):
        raise PlanError(
            "reuse: the whole model is compiled, as one piece of which nothing can be left out. "
            "Compile the parts that train, e.g. model.head = torch.compile(model.head)."
        )
    if any(is_sharded(param) or is_flattened(param) for param in model.parameters()):
        raise PlanError(
            "reuse: the model is sharded (FSDP); only whole parameters can be followed."
        )
