"""How tensors are divided among threads, and how compiled loops see their elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
#: elements that a thread takes at a time: few enough that threads end together
CHUNK = 65_536
#: how loops see the elements of a tensor; a bfloat16 is 16 bits to NumPy
ELEMENTS: dict[torch.dtype, Any] = {
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
    torch.bfloat16: np.uint16(0),
}


def chunks_of(sizes: Sequence[int]) -> Array:
    """Cut tensors into chunks; return rows of tensor, first element and end.

    Args:
        sizes: the number of elements of each tensor.
    """
    each = np.asarray(sizes, dtype=np.int64)
    parts = -(-each // CHUNK)
    tensors = np.repeat(np.arange(len(each)), parts)
    first = np.cumsum(parts) - parts
    starts = (np.arange(len(tensors)) - first[tensors]) * CHUNK
    ends = np.minimum(starts + CHUNK, each[tensors])
    return np.ascontiguousarray(np.stack([tensors, starts, ends], axis=1), dtype=np.int64)
