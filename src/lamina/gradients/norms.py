"""Norms of many gradients at once: dense, sparse, sharded, on several devices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def values_of(grad: torch.Tensor) -> torch.Tensor:
    """The numbers of a gradient that may differ from zero."""
    return grad.coalesce().values() if grad.is_sparse else grad


def all_finite(grad: torch.Tensor) -> bool:
    """Whether every number of a gradient is finite; of a sharded one, on every process alike."""
    return not int(gathered((~torch.isfinite(values_of(grad))).sum()))


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor (DTensor) in full, as every process then has it; others as they are."""
    full: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def each_norm(tensors: Sequence[torch.Tensor], p: float = 2.0) -> list[torch.Tensor]:
    """The p-norm of each tensor (a scalar tensor on its device); sharded ones as a whole."""
    dense = [values_of(tensor) for tensor in tensors]
    groups: dict[tuple[torch.device, torch.dtype, type], list[int]] = {}
    for index, tensor in enumerate(dense):
        groups.setdefault((tensor.device, tensor.dtype, type(tensor)), []).append(index)
    norms: list[torch.Tensor] = [torch.empty(0)] * len(dense)
    for indices in groups.values():
        found = torch._foreach_norm([dense[i] for i in indices], p)
        for index, norm in zip(indices, found, strict=True):
            norms[index] = gathered(norm)
    return norms


def total_norm(tensors: Sequence[torch.Tensor], p: float = 2.0) -> torch.Tensor:
    """The p-norm of all tensors together, as if they were one vector.

    Formula: `(sum |x|^p)^(1/p)` over every number of every tensor; the largest |x| for p = inf.
    """
    norms = each_norm(tensors, p)
    device = norms[0].device
    dtype = torch.promote_types(torch.float32, norms[0].dtype)
    together = torch.stack([norm.to(device=device, dtype=dtype) for norm in norms])
    return together.max() if math.isinf(p) else torch.linalg.vector_norm(together, p)
