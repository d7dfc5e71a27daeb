"""`torch.optim.lr_scheduler` by name, signature and default: change the import, keep the code.

Torch everywhere inside a schedule's planned range; `docs/explanation/differences-from-torch.md`
lists what differs, with the reasons.
"""

from __future__ import annotations

from .base import LRScheduler
from .composed import ChainedScheduler, SequentialLR
from .cyclic import CyclicLR
from .jumps import ConstantLR, ExponentialLR, MultiStepLR, StepLR
from .lambdas import LambdaLR, MultiplicativeLR
from .one_cycle import OneCycleLR
from .plateau import ReduceLROnPlateau
from .restarts import CosineAnnealingWarmRestarts
from .slopes import CosineAnnealingLR, LinearLR, LinearWarmupLR, PolynomialLR, WarmupLR

__all__ = [
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LRScheduler",
    "LambdaLR",
    "LinearLR",
    "LinearWarmupLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "SequentialLR",
    "StepLR",
    "WarmupLR",
]
