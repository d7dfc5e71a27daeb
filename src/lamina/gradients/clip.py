"""Clipping by norm, one norm for each scope, and what happens to non-finite gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils import get_total_norm

from ..errors import NonFiniteError


@dataclass
class Clipped:
    """What clipping one scope came to: its norm before, and the factor on its gradients."""

    norm: torch.Tensor
    factor: torch.Tensor | None


def clip_factor(grads: Sequence[torch.Tensor], threshold: float) -> Clipped:
    """The norm of all gradients together and the factor that brings it to the threshold.

    Formula: `min(1, threshold / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_`.
    """
    norm = get_total_norm(grads, 2.0, error_if_nonfinite=False)
    return Clipped(norm, torch.clamp(threshold / (norm + 1e-6), max=1.0))


def first_nonfinite(named: Sequence[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first gradient with a NaN or infinite number."""
    for name, grad in named:
        values = grad.coalesce().values() if grad.is_sparse else grad
        if not bool(torch.isfinite(values).all()):
            return name
    return None


def nonfinite_error(name: str, step: int) -> NonFiniteError:
    """The error for a gradient that must not reach the weights."""
    return NonFiniteError(
        f"the gradient of {name!r} is NaN or infinite at step {step}; the weights were not "
        "changed. Look at the loss of this batch; lower the lr or lengthen the warmup; under "
        "float16 use torch.amp.GradScaler; or skip such steps with Plan(nonfinite='skip')."
    )
