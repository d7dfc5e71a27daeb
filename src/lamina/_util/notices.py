"""Warnings that point at the user's line, each given once."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

import torch

from ..errors import LaminaWarning
from .sharding import is_distributed

#: packages whose frames lie between the user's line and lamina
_INSIDE = ("lamina", "torch", "lightning", "pytorch_lightning", "accelerate", "transformers")


def warn(message: str) -> None:
    """Emit a `LaminaWarning` that points at the user's line.

    Args:
        message: what was found and how to fix it.
    """
    warnings.warn(message, LaminaWarning, stacklevel=_level_of_caller())


def is_first_process() -> bool:
    """Return whether this is rank 0, or the only process: what all find alike, one says."""
    return not is_distributed() or torch.distributed.get_rank() == 0


class Notices:
    """The warnings of one optimizer; each is emitted once.

    What was emitted is no part of the optimizer's state: a resumed run is told again.
    """

    def __init__(self) -> None:
        self._given: set[str] = set()

    def tell(self, message: object, *, key: str | None = None) -> None:
        """Emit a warning unless one with the same key was emitted before.

        Args:
            message: a text or a `Finding`.
            key: what makes the warning the same as an earlier one; the whole message by default.
        """
        key = str(message) if key is None else key
        if key not in self._given:
            self._given.add(key)
            warn(str(message))


def _level_of_caller() -> int:
    """Return the `stacklevel`, seen from `warn`, of the nearest frame outside lamina and torch."""
    level = 2
    frame: FrameType | None = sys._getframe(2)
    while frame and str(frame.f_globals.get("__name__", "")).partition(".")[0] in _INSIDE:
        frame = frame.f_back
        level += 1
    return level if frame is not None else 2
