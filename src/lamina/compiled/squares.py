"""Norms of many tensors by a compiled loop, in one pass over memory and without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import repeat
from operator import attrgetter, is_not
from typing import Any

import numpy as np
import torch

from .._util.blocks import PLAIN
from .._util.tensors import addresses, waits
from .chunks import ELEMENTS, chunks_of
from .loader import failure, loop, unavailable
from .workers import WORKERS

Array = np.ndarray[Any, Any]
_PLAIN = frozenset(PLAIN)
_is_cpu, _dtype, _layout = attrgetter("is_cpu"), attrgetter("dtype"), attrgetter("layout")


def squares_of(tensors: Sequence[torch.Tensor]) -> Array | None:
    """Return the 2-norm of each tensor in float64, the same for any number of threads.

    Returns:
        An array; None where tensors are not all of one dtype, contiguous and on the CPU, or where
        there are no compiled loops.
    """
    first = tensors[0]
    if waits(first.device) or not first.is_cpu or first.dtype not in ELEMENTS:
        return None
    if not _is_compiled(first.dtype):
        return None
    dtype = first.dtype
    if not {*map(type, tensors)} <= _PLAIN or not all(map(_is_cpu, tensors)):
        return None
    if any(map(is_not, map(_dtype, tensors), repeat(dtype))):
        return None
    if any(map(is_not, map(_layout, tensors), repeat(torch.strided))):
        return None
    if not all(map(torch.Tensor.is_contiguous, tensors)):
        return None
    sizes = tuple(map(torch.Tensor.numel, tensors))
    chunks = _chunks(sizes)
    where = np.asarray(addresses(tensors), dtype=np.int64)
    if np.bitwise_or.reduce(where) % first.element_size():  # element sizes are powers of two
        return None
    sums, norms = np.zeros(len(chunks)), np.empty(len(sizes))
    arguments = (np.zeros(1, dtype=np.int64), chunks, where, sums, ELEMENTS[dtype])
    WORKERS.run(loop("squares_of"), arguments, sum(sizes))
    loop("norms_of")(chunks, sums, norms)
    return norms


@lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...]) -> Array:
    return chunks_of(sizes)


@cache
def _is_compiled(dtype: torch.dtype) -> bool:
    if unavailable():
        return False
    nothing, chunks = np.zeros(0), np.zeros((0, 3), dtype=np.int64)
    counter, where = np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64)
    calls = {
        "squares_of": (counter, chunks, where, nothing, ELEMENTS[dtype]),
        "norms_of": (chunks, nothing, nothing),
    }
    return not failure(calls)
