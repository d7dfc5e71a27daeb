"""The learning-rate range test: which lr to train with, found by training a copy for a few steps.

find_lr -> targets (whose lr is swept) -> trial (the copy) -> sweep -> curve -> FoundLR
"""

from __future__ import annotations

from .find import find_lr
from .found import FoundLR

__all__ = ["FoundLR", "find_lr"]
