"""The bandwidth bound: a kernel that reads and writes what an optimizer must, and does no more.

Without clipping, AdamW reads weight, gradient and two states, and writes all but the gradient: 4
reads and 3 writes of each number. SGD with momentum and RMSprop keep one state: 3 reads, 2 writes.
With clipping, the gradients are read once more before, as their norm must be known first.
The tensors are those of the case, and the threads and the way to reach memory are those of
lamina's compiled loops, so that only the arithmetic is missing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
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


def bandwidth_bound(shapes: dict[str, Shape], algorithm: str, clip: bool) -> Contestant:
    """The bound for tensors of these shapes, with new gradients at every step."""
    imported("numba", "numba")
    tried = [Streams(shapes, STATES[algorithm], size, clip) for size in CHUNKS]
    best = min(tried, key=lambda each: _median(each, each.fill))
    return Contestant(best, before=best.fill, after=best.clear)


class Streams:
    """Tensors, and a compiled loop that adds the gradient to the weight and to each state.

    Args:
        shapes: of the weights.
        states: how many there are of each weight, 1 or 2.
        chunk: numbers that a thread takes at a time.
        clip: whether all gradients are read once before.
    """

    def __init__(
        self, shapes: dict[str, Shape], states: int, chunk: int, clip: bool = False
    ) -> None:
        from lamina.compiled.workers import WORKERS

        self._workers, self._clip = WORKERS, clip
        self._both = True if states == 2 else None
        self._source = [torch.randn(shape) for shape in shapes.values()]
        self.grads: list[torch.Tensor] = []
        self.kept = [[torch.zeros_like(each) for each in self._source] for _ in range(states + 1)]
        self._count, sizes = numbers(shapes), [tensor.numel() for tensor in self._source]
        rows = [
            (tensor, first, min(first + chunk, size))
            for tensor, size in enumerate(sizes)
            for first in range(0, size, chunk)
        ]
        self._chunks = np.asarray(rows, dtype=np.int64)
        self._counter = np.zeros(1, dtype=np.int64)
        self._places = np.zeros((states + 2, len(sizes)), dtype=np.int64)
        #: of the gradients of each chunk, if they are read before
        self.sums = np.zeros(len(rows), dtype=np.float32)

    def fill(self) -> None:
        """Make new gradients, as a backward pass does."""
        self.grads = [tensor.clone() for tensor in self._source]

    def clear(self) -> None:
        """Let go of the gradients."""
        self.grads = []

    def __call__(self) -> None:
        for row, tensors in enumerate([self.grads, *self.kept]):
            self._places[row] = [tensor.data_ptr() for tensor in tensors]
        read, add = _loops()
        if self._clip:
            self._run(read, self.sums)
        self._run(add, self._both)

    def _run(self, loop: Any, *more: Any) -> None:
        self._counter[0] = 0
        arguments = (self._counter, self._chunks, self._places, np.float32(0), *more)
        self._workers.run(loop, arguments, self._count)


def _median(step: Callable[[], Any], before: Callable[[], None]) -> float:
    times = []
    for _ in range(6):
        before()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first one compiles


@cache
def _loops() -> tuple[Any, Any]:
    """Return the loops: one that reads, and one that adds; `both` is None for one state."""
    import numba

    from lamina.compiled.access import claim, load, store

    def read(counter, chunks, places, like, sums):
        while True:
            chunk = claim(counter)
            if chunk >= len(chunks):
                return
            tensor, start, end = chunks[chunk, 0], chunks[chunk, 1], chunks[chunk, 2]
            total = like
            for i in range(start, end):
                total += load(places[0, tensor], i, like, 0)
            sums[chunk] = total

    def add(counter, chunks, places, like, both):
        while True:
            chunk = claim(counter)
            if chunk >= len(chunks):
                return
            tensor, start, end = chunks[chunk, 0], chunks[chunk, 1], chunks[chunk, 2]
            grads, weights, first = places[0, tensor], places[1, tensor], places[2, tensor]
            second = places[-1, tensor]
            for i in range(start, end):
                number = load(grads, i, like, 0)
                store(first, i, like, 1, load(first, i, like, 1) + number)
                if both is not None:  # left out of the code where it is None
                    store(second, i, like, 2, load(second, i, like, 2) + number)
                store(weights, i, like, 3, load(weights, i, like, 3) + number)

    return numba.njit(nogil=True, fastmath={"reassoc"})(read), numba.njit(nogil=True)(add)
