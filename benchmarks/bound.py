"""The bandwidth bound: a kernel that reads and writes what an optimizer must, and does no more.

Without clipping, AdamW reads weight, gradient and two states, and writes all but the gradient: 4
reads and 3 writes of each number. SGD with momentum and RMSprop keep one state: 3 reads, 2 writes.
The tensors are those of the case, and the threads and the way to reach memory are those of
lamina's compiled loops, so that only the arithmetic is missing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .candidates import imported
from .measure import Contestant
from .shapes import Shape, numbers

#: numbers that a thread takes at a time; the fastest is used
CHUNKS = (1 << 13, 1 << 16, 1 << 19)
#: how many states an optimizer keeps of each number
STATES = {"AdamW": 2, "SGD": 1, "RMSprop": 1}
NAME = "bandwidth bound"


def bandwidth_bound(shapes: dict[str, Shape], algorithm: str) -> Contestant:
    """The bound for tensors of these shapes, with new gradients at every step."""
    imported("numba", "numba")
    from lamina.compiled import chunks
    from lamina.compiled.workers import WORKERS

    kernel = _kernel(STATES[algorithm])
    kept = [[torch.zeros(shape) for shape in shapes.values()] for _ in range(STATES[algorithm] + 1)]
    source = [torch.randn(shape) for shape in shapes.values()]
    count, sizes = numbers(shapes), [tensor.numel() for tensor in source]
    tables = {}
    for size in CHUNKS:
        each = np.asarray([-(-n // size) for n in sizes])
        owners = np.repeat(np.arange(len(sizes)), each)
        first = np.concatenate([np.arange(n) for n in each]) * size
        ends = np.minimum(first + size, np.asarray(sizes)[owners])
        tables[size] = np.ascontiguousarray(np.stack([owners, first, ends], axis=1))
    counter, places = np.zeros(1, dtype=np.int64), np.zeros((4, len(sizes)), dtype=np.int64)
    grads: list[torch.Tensor] = []

    def fill() -> None:
        grads[:] = [tensor.clone() for tensor in source]

    def run(size: int) -> None:
        counter[0] = 0
        for row, tensors in enumerate([grads, *kept]):
            places[row] = [tensor.data_ptr() for tensor in tensors]
        element = chunks.ELEMENTS[torch.float32]
        WORKERS.run(kernel, (counter, tables[size], places, element), count)

    best = min(CHUNKS, key=lambda size: _median(lambda: run(size), fill))
    return Contestant(lambda: run(best), before=fill, after=grads.clear)


def _median(step: Callable[[], Any], before: Callable[[], None]) -> float:
    times = []
    for _ in range(6):
        before()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first one compiles


def _kernel(states: int) -> Any:
    """Compile the kernel; it adds the gradient to the weight and to each state."""
    import numba

    from lamina.compiled.access import claim, load, store

    def two(counter, chunks, places, like):
        while True:
            chunk = claim(counter)
            if chunk >= len(chunks):
                return
            tensor, start, end = chunks[chunk, 0], chunks[chunk, 1], chunks[chunk, 2]
            grads, weights = places[0, tensor], places[1, tensor]
            first, second = places[2, tensor], places[3, tensor]
            for i in range(start, end):
                number = load(grads, i, like, 0)
                store(first, i, like, 1, load(first, i, like, 1) + number)
                store(second, i, like, 2, load(second, i, like, 2) + number)
                store(weights, i, like, 3, load(weights, i, like, 3) + number)

    def one(counter, chunks, places, like):
        while True:
            chunk = claim(counter)
            if chunk >= len(chunks):
                return
            tensor, start, end = chunks[chunk, 0], chunks[chunk, 1], chunks[chunk, 2]
            grads, weights, first = places[0, tensor], places[1, tensor], places[2, tensor]
            for i in range(start, end):
                number = load(grads, i, like, 0)
                store(first, i, like, 1, load(first, i, like, 1) + number)
                store(weights, i, like, 3, load(weights, i, like, 3) + number)

    return numba.njit(nogil=True)({1: one, 2: two}[states])
