"""`torch.optim` by name, signature and default: change the import, keep the code."""

from __future__ import annotations

from torch.optim import Optimizer

from .classes import SGD, Adam, AdamW, RMSprop
from .registry import register_optimizer

for _own in (SGD, RMSprop, Adam, AdamW):
    register_optimizer(_own.__name__, _own)

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "RMSprop", "register_optimizer"]
