"""What depends on the version of torch. The oldest one that lamina supports is 2.6.

Since 2.6 optimizers take named parameters, and state is matched by those names; below it a state
that torch saved could go to the wrong parameter. Each name here says which version it is about.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..errors import LaminaError


def _not_yet(*args: Any, **keywords: Any) -> Any:
    """Raise `LaminaError`: this version of torch has no such function."""
    raise LaminaError(
        "swap_in_optimizer_params_and_state is torch's own and came with torch 2.13, but this is "
        f"torch {torch.__version__}. Update it with: pip install 'torch>=2.13'"
    )


#: torch's own since 2.13
swap_in_optimizer_params_and_state: Callable[..., Any] = getattr(
    torch.optim, "swap_in_optimizer_params_and_state", _not_yet
)


def update_lr(scheduler: Any, epoch: float | None = None) -> None:
    """Move a scheduler to its next epoch, or to a given one, as a sequence of schedulers does.

    Torch's own schedulers have a method for it since 2.9. Before, torch called `step(epoch)`, which
    says that it is deprecated and counts as a step; so the count is put back.

    Args:
        scheduler: torch's or lamina's.
        epoch: the epoch to move to; None for the next one.
    """
    if hasattr(scheduler, "_update_lr"):
        scheduler._update_lr(epoch)
        return
    count = scheduler._step_count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        scheduler.step(epoch)
    scheduler._step_count = count
