"""Questions about tensors in memory: which share elements, and whether they lie as before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

#: candidates that are tried before two tensors are taken to overlap; real layouts need few
_MAX_WORK = 1_000_000
#: kinds of devices whose numbers the host has at once; without them, a test of the CPU steps as an
#: accelerator does
READ_FREELY = frozenset({"cpu"})


def overlapping(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Return pairs of positions of tensors that share elements: each of these is in one or more."""
    stored: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
    for place, tensor in enumerate(tensors):
        span = _span(tensor)
        if span is not None:
            storage, low, high = span
            stored.setdefault(storage, []).append((low, -high, place))
    pairs, paired = [], set[int]()
    for spans in stored.values():
        near: list[tuple[int, int, np.ndarray[Any, Any]]] = []  # those that reach into the next
        for low, minus_high, place in sorted(spans) if len(spans) > 1 else ():
            layout = _layout(tensors[place])
            near = [item for item in near if item[0] > low]
            for _, other, its in near:
                if not {other, place} <= paired and _meet(its, layout):
                    pairs.append((min(other, place), max(other, place)))
                    paired |= {other, place}
            near.append((-minus_high, place, layout))
    return pairs


def relation(one: torch.Tensor, other: torch.Tensor) -> str:
    """Return how two tensors lie over memory that they share.

    Returns:
        `"apart"` if they share none, `"same"` for the same elements in the same order,
        `"transposed"`, or `"view"` for any other way.
    """
    mine, theirs = _span(one), _span(other)
    if mine is None or theirs is None or mine[0] != theirs[0]:
        return "apart"
    if not _meet(_layout(one), _layout(other)):
        return "apart"
    if mine[1] == theirs[1] and one.dtype == other.dtype:
        shape, stride = tuple(one.shape), one.stride()
        if (shape, stride) == (tuple(other.shape), other.stride()):
            return "same"
        if one.ndim > 1 and (shape[::-1], stride[::-1]) == (tuple(other.shape), other.stride()):
            return "transposed"
    return "view"


def is_dtensor(tensor: Any) -> bool:
    """Return whether this is a tensor of FSDP2, or of tensor parallelism."""
    return hasattr(tensor, "to_local")  # importing the class costs every user a second


def waits(device: torch.device) -> bool:
    """Return whether reading a number of this device on the host waits for the device.

    The one place that decides whether a step may read its norms and flags, or must leave them on
    the device.
    """
    return device.type not in READ_FREELY


def _span(tensor: torch.Tensor) -> tuple[tuple[str, int], int, int] | None:
    """Return where a tensor lies: its device and storage, the first byte in it, the one after it.

    None where there is no real memory to compare.
    """
    if tensor.is_meta or is_dtensor(tensor) or tensor.layout != torch.strided:
        return None
    if tensor.numel() == 0 or is_lazy(tensor):
        return None
    try:
        address = tensor.untyped_storage().data_ptr()
    except RuntimeError:  # a wrapper, such as torchao's quantized weights, has none of its own
        return None
    low = int(tensor.storage_offset()) * tensor.element_size()
    high = low + _extent(tensor) * tensor.element_size()
    return (str(tensor.device), address), low, high


def _extent(tensor: torch.Tensor) -> int:
    """Return how many places there are from the first element to the last; some may be gaps."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _layout(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor as NumPy sees it: where its elements lie, which are never read."""
    size = tensor.element_size()
    interface = {
        "version": 3,
        "shape": tuple(tensor.shape),
        "strides": tuple(stride * size for stride in tensor.stride()),
        "typestr": f"|V{size}",
        "data": (tensor.data_ptr(), False),
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def _meet(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    """Solve exactly, in whole numbers, whether two layouts have a byte in common."""
    try:
        return bool(np.shares_memory(one, other, _MAX_WORK))  # type: ignore[arg-type]
    except RuntimeError:  # TooHardError, which has no place of its own in older versions
        return True


class MemorySnapshot:
    """How tensors lie in memory at one moment, to be compared at every step with how they lie then.

    Shape, strides, dtype, device and class are compared by the class that guards compiled graphs of
    torch, in one call in C for all tensors. It is not public, so that a slower way stands ready.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._guards = _guards(tensors)
        self._forms = _forms(tensors) if self._guards is None else None

    def matches(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether these tensors have the forms of the ones that were given."""
        if self._guards is not None:
            return bool(self._guards.check(*tensors))
        return _forms(tensors) == self._forms


def _guards(tensors: Sequence[torch.Tensor]) -> Any:
    """Return torch's guards over these tensors, or None where it has none for them."""
    try:
        made = torch._C._dynamo.guards.TensorGuards(
            *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
        )
        return made if made.check(*tensors) else None  # a tensor that is given twice fails
    except (AttributeError, TypeError, RuntimeError):
        return None


def _forms(tensors: Sequence[torch.Tensor]) -> tuple[list[Any], ...]:
    return (
        list(map(torch.Tensor.size, tensors)),
        list(map(torch.Tensor.stride, tensors)),
        [tensor.dtype for tensor in tensors],
        list(map(torch.Tensor.get_device, tensors)),
    )


def addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return where the elements of strided tensors begin; 0 where there are none."""
    return list(map(torch.Tensor.data_ptr, tensors))


def has_elements(tensor: torch.Tensor) -> bool:
    """Return whether the storage of a tensor is large enough for all its elements.

    `untyped_storage().resize_(0)` frees the memory and leaves the tensor its shape. True for what
    has no storage of its own to look at.
    """
    if is_dtensor(tensor):
        tensor = tensor._local_tensor  # type: ignore[attr-defined]
    if tensor.layout is not torch.strided or tensor.is_meta or is_lazy(tensor):
        return True
    if not tensor.numel():
        return True
    try:
        held = tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):  # of a subclass that keeps its numbers elsewhere
        return True
    count = tensor.numel() if tensor.is_contiguous() else _extent(tensor)
    return held >= (tensor.storage_offset() + count) * tensor.element_size()


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Return whether two elements of a tensor are one place in memory, as after `expand`."""
    if tensor.layout is not torch.strided or tensor.is_contiguous() or not tensor.numel():
        return False
    reach = 0  # of the dimensions so far, the smallest steps first
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return not _all_apart(tensor)
            reach += stride * (size - 1)
    return False


def _all_apart(tensor: torch.Tensor) -> bool:
    """Return whether all elements lie at places of their own, by going through them."""
    if 0 in (s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        return False
    places = np.zeros(1, dtype=np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[:, None] + np.arange(size) * stride).reshape(-1)
    return len(np.unique(places)) == len(places)


def have_addresses(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether all tensors have data; False also for sparse ones."""
    try:
        return all(map(torch.Tensor.data_ptr, tensors))
    except RuntimeError:  # of a sparse tensor
        return False
