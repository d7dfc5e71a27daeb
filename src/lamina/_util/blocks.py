"""The same elements of several tensors, a block at a time, so that temporaries stay small."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

#: elements for each thread of the CPU: all arrays of a rule, in float32, stay in its cache
BLOCK = 65_536
#: elements on an accelerator, where a block costs a few launches
ACCELERATOR_BLOCK = 4_194_304

#: types whose views are what they seem
PLAIN = (torch.Tensor, torch.nn.Parameter)
Tensors = Sequence[torch.Tensor]


def block_length(tensor: torch.Tensor) -> int:
    """Return how many elements of a tensor are updated at a time."""
    return BLOCK * torch.get_num_threads() if tensor.is_cpu else ACCELERATOR_BLOCK


def in_blocks(tensors: Tensors, length: int) -> Iterable[Tensors]:
    """Cut tensors of one shape into views of the same elements, at most `length` of them.

    Tensors of any layout in memory can be cut. Subclasses are left whole: a view of one may be
    something else.
    """
    first = tensors[0]
    if first.numel() <= length or any(type(tensor) not in PLAIN for tensor in tensors):
        return [tensors]
    stride = first.stride()
    if is_dense(first) and all(tensor.stride() == stride for tensor in tensors):
        flat = [tensor.as_strided((first.numel(),), (1,)) for tensor in tensors]
        return zip(*(each.split(length) for each in flat), strict=True)
    return _cut(tensors, length, 0)


def _cut(tensors: Tensors, length: int, dim: int) -> Iterator[Tensors]:
    """Cut along one dimension, and what is still too large along the next ones."""
    first = tensors[0]
    if first.numel() <= length or dim == first.ndim:
        yield tensors
        return
    rows = max(1, length * first.shape[dim] // first.numel())
    for parts in zip(*(tensor.split(rows, dim) for tensor in tensors), strict=True):
        yield from _cut(parts, length, dim + 1)


def is_dense(tensor: torch.Tensor) -> bool:
    """Return whether the elements fill their stretch of memory without gaps or overlaps."""
    # torch keeps the strides of such tensors, and only of such
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()
