"""How batches of tensors are updated: one function picks the kernel and can say why."""

from __future__ import annotations

from .differentiable import differentiate
from .dispatch import KERNELS, apply, assign, carry_out, choose, reason_of, step_device

__all__ = [
    "KERNELS",
    "apply",
    "assign",
    "carry_out",
    "choose",
    "differentiate",
    "reason_of",
    "step_device",
]
