"""`lamina.reuse`: the entry."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .._util.numbers import is_number, is_whole
from .._util.sharding import is_flattened, is_sharded
from .._util.text import quoted
from ..errors import PlanError, did_you_mean
from ..optimizer.wrapped import unwrap
from .copies import compiled_paths
from .session import Reuse

_SETTINGS = ("space", "folder", "debug", "preprocessing")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def reuse(
    model: nn.Module,
    optimizer: Any,
    *,
    space: int | str = "2 GB",
    folder: str | os.PathLike[str] | None = None,
    debug: float = 0.0,
    preprocessing: str = "",
) -> Reuse:
    """Compute what is frozen once per example, and reuse its outputs with the same bits.

    A training step of a model of which a part is frozen computes

        loss(trained(frozen(x)))

    and frozen(x) is the same in every epoch. From now on every forward pass of the model stores
    the outputs of frozen modules that something else reads, and replays them when the same
    examples come again. Results do not change: whatever may differ from pass to pass is found and
    left alone (see docs/how-to/reuse.md).

    Args:
        model: the model, or the module inside of a wrapper for several processes.
        optimizer: built by `Plan.build` for it, or a wrapper of that.
        space: how much may be stored: bytes, or a text such as "500 MB" or "2 GiB".
        folder: where to store it as files, so that a later process with the same weights can go
            on; by default in memory. Each process needs a folder of its own.
        debug: the share of the replayed calls that are made all the same, to compare bits.
        preprocessing: a text that says how inputs were prepared before they became tensors; what
            is stored under another one is not used.

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
    _check_settings(folder, debug, preprocessing)
    amount = parse_space(space)
    _check_model(model)
    place = None if folder is None else Path(folder)
    return Reuse(model, unwrap(optimizer), amount, place, debug, preprocessing)


def reuse_settings(given: Any) -> dict[str, Any] | None:
    """Return the settings that a `reuse=` stands for, checked before there is a model.

    Args:
        given: True, False, or a mapping of arguments of `lamina.reuse`.

    Returns:
        The arguments; None for False.

    Raises:
        PlanError: if it is something else, or an argument is unknown or not what is expected.

    Example:
        >>> reuse_settings(True), reuse_settings({"space": "1 GB"}), reuse_settings(False)
        ({}, {'space': '1 GB'}, None)
    """
    if isinstance(given, bool):
        return {} if given else None
    if not isinstance(given, Mapping):
        raise PlanError(
            f"reuse={given!r} was given; expected True, False, or settings of lamina.reuse such as "
            "{'space': '500 MB'}."
        )
    for name in given:
        if name not in _SETTINGS:
            raise PlanError(
                f"reuse: there is no setting {name!r}; expected {quoted(_SETTINGS, 4)}."
                f"{did_you_mean(str(name), _SETTINGS)}"
            )
    settings = dict(given)
    _check_settings(
        settings.get("folder"), settings.get("debug", 0.0), settings.get("preprocessing", "")
    )
    parse_space(settings.get("space", 0))
    return settings


def parse_space(given: int | str) -> int:
    """Return a number of bytes.

    Raises:
        PlanError: if it cannot be read.

    Example:
        >>> parse_space("1.5 GB"), parse_space("2 MiB"), parse_space(10)
        (1500000000, 2097152, 10)
    """
    if is_whole(given) and given >= 0:
        return int(given)
    match = re.fullmatch(
        r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([KMGT]?i?B)\s*", str(given), re.IGNORECASE
    )
    if isinstance(given, str) and match:
        return int(float(match[1]) * _UNITS[match[2].upper()])
    raise PlanError(
        f"reuse: space={given!r} was given; expected bytes, or a text such as '500 MB' or '2 GiB'."
    )


def _check_settings(folder: Any, debug: Any, preprocessing: Any) -> None:
    """Raise `PlanError` for an argument of the wrong type or out of its range."""
    if folder is not None and not isinstance(folder, (str, os.PathLike)):
        raise PlanError(f"reuse: folder={folder!r} was given; expected the path of a folder.")
    if not is_number(debug) or not 0 <= debug <= 1:
        raise PlanError(f"reuse: debug={debug!r} was given; expected a share from 0 to 1.")
    if not isinstance(preprocessing, str):
        raise PlanError("reuse: preprocessing must be a text.")


def _check_model(model: Any) -> None:
    """Raise `PlanError` for a model whose passes cannot be followed."""
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
