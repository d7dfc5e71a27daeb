"""Norms of many gradients at once: dense, sparse, sharded, on several devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from .._util.blocks import block_length, in_blocks
from .._util.sharding import local_part, wholes_of
from .._util.tensors import is_dtensor
from ..algorithms.base import HALF, widen
from ..compiled.squares import squares_of

_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}


def values_of(grad: torch.Tensor) -> torch.Tensor:
    """Return the numbers of a gradient that may differ from zero."""
    return grad.coalesce().values() if grad.is_sparse else grad


def bad_counts(grads: Sequence[torch.Tensor]) -> list[int]:
    """Return how many numbers of each gradient are not finite; of sharded ones, of the whole."""
    return list(map(int, wholes_of([(~torch.isfinite(values_of(g))).sum() for g in grads])))


def all_finite(grad: torch.Tensor) -> bool:
    """Return whether a gradient is finite; of a sharded one, on all processes alike."""
    return not any(bad_counts([grad]))


class MeasuredNorms(Sequence[torch.Tensor]):
    """Norms that were measured on the CPU: scalar tensors, made when they are asked for."""

    def __init__(self, values: np.ndarray[Any, Any], dtype: torch.dtype) -> None:
        self.values = values
        self._dtype = torch.float32 if dtype in HALF else dtype

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._tensor(value) for value in self.values[index]]
        return self._tensor(self.values[index])

    def total(self) -> torch.Tensor:
        """Return the 2-norm of all of them together."""
        largest = self.values.max()
        if not 0 < largest < math.inf:  # zeros, or what is no number
            return self._tensor(largest)
        return self._tensor(largest * np.linalg.norm(self.values / largest))

    def are_finite(self) -> bool:
        """Return whether all of them are finite in their dtype."""
        # False for NaN. `values.max()` does the same, by way of a function in Python.
        return bool(np.maximum.reduce(self.values) <= _LARGEST[self._dtype])

    def _tensor(self, value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=self._dtype)


def each_norm(tensors: Sequence[torch.Tensor], p: float = 2.0) -> Sequence[torch.Tensor]:
    """Return the p-norm of each tensor (a scalar tensor on its device); sharded ones as a whole.

    Of sharded tensors laid out alike, all norms are put together by one collective. Norms of 16-bit
    floats are float32: they easily pass 65504, and have more digits.
    """
    squares = squares_of(tensors) if p == 2 and tensors else None
    if squares is not None:
        return MeasuredNorms(squares, tensors[0].dtype)
    dense = [values_of(each) if each.is_sparse else each for each in tensors]
    groups: dict[tuple[torch.device, torch.dtype, type], list[int]] = {}
    norms: list[torch.Tensor] = [torch.empty(0)] * len(dense)
    largest = []
    for index, tensor in enumerate(dense):
        if p == math.inf and (is_dtensor(tensor) or not tensor.numel()):
            largest.append(index)  # torch has no largest number of an empty tensor
        else:
            groups.setdefault((tensor.device, tensor.dtype, type(tensor)), []).append(index)
    for (_, dtype, _), indices in groups.items():
        norms_of = _norms_of_half if dtype in HALF else torch._foreach_norm
        found: Any = norms_of([dense[i] for i in indices], p)
        for index, norm in zip(indices, wholes_of(found), strict=True):
            norms[index] = norm
    for index, norm in zip(largest, _largest([dense[i] for i in largest]), strict=True):
        norms[index] = norm
    return norms


def _norms_of_half(tensors: list[torch.Tensor], p: float) -> Sequence[torch.Tensor]:
    """Return norms in float32; on the CPU torch would copy each whole tensor to float32."""
    if not tensors[0].is_cpu or p <= 0:
        return torch._foreach_norm(tensors, p, dtype=torch.float32)
    length = block_length(tensors[0])
    blocks = [[block for (block,) in in_blocks([tensor], length)] for tensor in tensors]
    found = iter(torch._foreach_norm(list(chain.from_iterable(blocks)), p, dtype=torch.float32))
    norms = [list(islice(found, len(each))) for each in blocks]
    return [total(each, p) if len(each) > 1 else each[0] for each in norms]


def total_norm(tensors: Sequence[torch.Tensor], p: float = 2.0) -> torch.Tensor:
    """Return the p-norm of all tensors together, as if they were one vector.

    Formula: `(sum |x|^p)^(1/p)` over every number of every tensor; the largest |x| for p = inf.
    """
    return total(each_norm(tensors, p), p)


def total(norms: Sequence[torch.Tensor], p: float) -> torch.Tensor:
    """Return the p-norm of what several p-norms are of."""
    if isinstance(norms, MeasuredNorms) and p == 2:
        return norms.total()
    device = norms[0].device
    together = torch.stack([norm.to(device) for norm in norms])
    return together.max() if math.isinf(p) else torch.linalg.vector_norm(together, p)


def finite(norms: Sequence[torch.Tensor]) -> bool:
    """Return whether all these scalars are finite; waits for an accelerator once."""
    if isinstance(norms, MeasuredNorms):
        return norms.are_finite()
    if len(norms) == 1:
        return math.isfinite(float(norms[0]))
    device = norms[0].device  # each by itself: their sum may overflow though none of them did
    return bool(torch.isfinite(torch.stack([norm.to(device) for norm in norms])).all())


def every_finite(grads: Sequence[torch.Tensor]) -> bool:
    """Return whether every number of every gradient is finite; reads each once, all in one go.

    A norm that is finite proves it. One that is not may have overflowed, which a second look tells.
    """
    return not grads or finite(each_norm(grads)) or not any(bad_counts(grads))


def clamped(numbers: torch.Tensor, limit: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """Clamp numbers to [-limit, limit]; a limit beyond their dtype changes nothing.

    Beyond it, as for an infinite limit, all of them are inside.
    """
    if torch.finfo(numbers.dtype).max < limit:
        return numbers
    return torch.clamp(numbers, -limit, limit, out=out)


def _largest(grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the largest |x| of each, 0 if there is none; the shard of a process may be empty."""
    found = list(map(_most, map(local_part, map(_summed, grads))))
    alike: dict[Any, list[int]] = {}
    for index, grad in enumerate(grads):
        if is_dtensor(grad):
            each: Any = grad
            alike.setdefault((each.device_mesh, each.placements, found[index].dtype), []).append(
                index
            )
    for (mesh, placements, _), indices in alike.items():
        from torch.distributed.tensor import DTensor, Shard

        parts = [Shard(0) if place.is_shard() else place for place in map(_place, placements)]
        rows = torch.stack([found[index] for index in indices]).reshape(1, -1)
        every: Any = DTensor.from_local(rows, mesh, parts, run_check=False)
        for index, most in zip(indices, every.full_tensor().amax(0).unbind(), strict=True):
            found[index] = most
    return found


def _summed(grad: torch.Tensor) -> torch.Tensor:
    """Return a gradient of which each process has a summand as a whole; others as they are."""
    if not is_dtensor(grad):
        return grad
    shared: Any = grad
    summed: torch.Tensor = shared.redistribute(placements=list(map(_place, shared.placements)))
    return summed


def _place(place: Any) -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate() if place.is_partial() else place


def _most(tensor: torch.Tensor) -> torch.Tensor:
    numbers = tensor.abs()
    return widen(numbers.max() if numbers.numel() else numbers.sum())


# ------------------------------------------------------------------------ without waiting for it


def largest(grads: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return the largest |x| of each gradient: finite exactly where all its numbers are.

    Other than a sum of squares it cannot overflow, so that no second look is needed.
    """
    real = [torch.view_as_real(grad) if grad.is_complex() else grad for grad in grads]
    return each_norm(real, math.inf)


def found_inf(norms: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return 1.0 if one of these scalars is not finite, else 0.0, as a tensor on a device.

    In the form that torch's fused operators take; nothing is read on the host.
    """
    every = torch.stack([norm.to(device) for norm in norms])
    return torch.isfinite(every).all().logical_not().float()
