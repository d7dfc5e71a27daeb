"""Tensors that are computed only if something looks at them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

#: what may be asked of a tensor without its values
_SHAPE_ONLY = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.layout.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_sparse.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_nested.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_quantized.__get__,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.ndimension,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.stride,
    torch.Tensor.is_contiguous,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.__len__,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}


@dataclass(frozen=True)
class TensorForm:
    """What is known of a tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorForm:
        """Return the form of a tensor."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)

    def size_in_bytes(self) -> int:
        """Return how many bytes its elements take."""
        return math.prod(self.shape) * self.dtype.itemsize

    def row_in_bytes(self, dim: int, narrow: torch.dtype | None = None) -> int:
        """Return how many bytes each index of a dimension takes where it is stored.

        Args:
            dim: the dimension.
            narrow: what wider tensors are rounded to.
        """
        count = math.prod(self.shape) // self.shape[dim]
        return count * stored_dtype(self.dtype, narrow).itemsize


def stored_dtype(dtype: torch.dtype, narrow: torch.dtype | None) -> torch.dtype:
    """Return what tensors of a dtype are stored as, if wider ones are rounded to another."""
    if narrow is None or not dtype.is_floating_point or dtype.itemsize <= narrow.itemsize:
        return dtype
    return narrow


class LazyTensor(torch.Tensor):
    """Stands for an output of a call that was left out; any use of its values makes the call.

    A real tensor takes its place before any function of torch runs, so that what is computed with
    it is computed by the same code as without.
    """

    _compute: Callable[[], torch.Tensor]

    def __new__(cls, form: TensorForm, compute: Callable[[], torch.Tensor]) -> LazyTensor:
        """Make one of a form; `compute` gives the real tensor, as often as it is asked."""
        made: LazyTensor = torch.Tensor._make_wrapper_subclass(
            cls, form.shape, strides=form.stride, dtype=form.dtype, device=form.device
        )
        made._compute = compute
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SHAPE_ONLY:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = real((args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = real((args, kwargs or {}))
        return func(*args, **kwargs)


def real(tree: Any) -> Any:
    """Return nested containers with every lazy tensor computed."""
    return tree_map_only(LazyTensor, compute, tree)


def compute(tensor: LazyTensor) -> torch.Tensor:
    """Return the real tensor that a lazy one stands for."""
    with torch._C.DisableTorchFunctionSubclass():
        computed: torch.Tensor = tensor.__dict__["_compute"]()
    return computed
