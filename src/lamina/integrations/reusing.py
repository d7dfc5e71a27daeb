"""`reuse=` of every integration: begins what `lamina.reuse` does, or says why it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._util.sharding import is_distributed
from ..errors import PlanError
from ..optimizer.optimizer import Optimizer
from ..reuse import Reuse
from ..reuse import reuse as reuse_frozen
from .common import tell

#: wrappers that call the model as it is, with the attribute that holds it
_TRANSPARENT = {"DistributedDataParallel": "module", "_FabricModule": "module"}
_REFUSED = {
    "OptimizedModule": (
        "is compiled as a whole, as one piece of which nothing can be left out. Compile the parts "
        "that train instead, e.g. model.head = torch.compile(model.head)"
    ),
    "DataParallel": (
        "is copied to every device in each pass (DataParallel), and no copy is followed. Use one "
        "device, or DistributedDataParallel (torchrun)"
    ),
}


def begin_reuse(
    model: nn.Module,
    wrapped: nn.Module,
    optimizer: Optimizer,
    settings: Mapping[str, Any] | None,
) -> Reuse | None:
    """Begin to reuse what is frozen; where that is impossible, say so, and training goes on.

    Args:
        model: the model.
        wrapped: what the trainer has made of it and calls.
        optimizer: that of the plan.
        settings: checked by `reuse_settings`; None if nothing is to be reused.
    """
    if settings is None:
        return None
    try:
        _check_wrappers(model, wrapped)
        return reuse_frozen(model, optimizer, **_own_folder(settings))
    except PlanError as error:
        tell(f"Nothing is reused, and training goes on without: {error}")
        return None


def _check_wrappers(model: nn.Module, wrapped: nn.Module) -> None:
    """Raise `PlanError` for a wrapper that does not simply call the model."""
    name = type(model).__name__
    if name in _REFUSED:
        raise PlanError(f"the model {_REFUSED[name]}.")
    while wrapped is not model:
        name = type(wrapped).__name__
        if name not in _TRANSPARENT:
            reason = _REFUSED.get(name, f"is wrapped in {name}, which is not known to lamina")
            raise PlanError(f"the model {reason}.")
        wrapped = getattr(wrapped, _TRANSPARENT[name])


def _own_folder(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with a folder for this process alone, if there are several."""
    own = dict(settings)
    if own.get("folder") is not None and is_distributed():
        own["folder"] = Path(own["folder"]) / f"process{torch.distributed.get_rank()}"
    return own
