"""The optimization algorithms: one family a file, each rule written once beside its equation."""

from __future__ import annotations

from .adam import Adam, AdamW
from .base import Algorithm, Batch
from .rmsprop import RMSprop
from .sgd import SGD

ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm for algorithm in (SGD(), RMSprop(), Adam(), AdamW())
}

__all__ = ["ALGORITHMS", "Adam", "AdamW", "Algorithm", "Batch", "RMSprop", "SGD"]
