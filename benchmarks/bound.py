"""The bandwidth bound: a kernel that reads and writes what an optimizer must, and does no more.

Without clipping, AdamW reads weight, gradient and two states, and writes all but the gradient: 4
reads and 3 writes of each number. SGD with momentum and RMSprop keep one state: 3 reads, 2 writes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .candidates import imported
from .measure import Contestant
from .shapes import Shape, numbers

#: numbers that a thread takes at a time; the fastest is used
CHUNKS = (1 << 12, 1 << 14, 1 << 16, 1 << 18)
#: how many states an optimizer keeps of each number
STATES = {"AdamW": 2, "SGD": 1, "RMSprop": 1}
NAME = "bandwidth bound"


def bandwidth_bound(shapes: dict[str, Shape], algorithm: str) -> Contestant:
    """The bound for tensors that lie one behind the other."""
    run = _kernel(STATES[algorithm])
    count = numbers(shapes)
    # allocated and written by torch, as the tensors of the others are
    arrays = [torch.zeros(count).numpy() for _ in range(2 + STATES[algorithm])]
    grad = torch.randn(count)

    def fill() -> None:
        arrays[0] = grad.clone().numpy()

    chunk = min(CHUNKS, key=lambda size: _median(lambda: run(size, *arrays), fill))
    return Contestant(lambda: run(chunk, *arrays), before=fill)


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
    numba = imported("numba", "numba")
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    compile_ = numba.njit(parallel=True, fastmath=True, nogil=True)

    def two(chunk, grad, weight, first, second):
        for part in numba.prange((grad.size + chunk - 1) // chunk):
            for i in range(part * chunk, min(grad.size, (part + 1) * chunk)):
                number = grad[i]
                first[i] += number
                second[i] += number
                weight[i] += number

    def one(chunk, grad, weight, first):
        for part in numba.prange((grad.size + chunk - 1) // chunk):
            for i in range(part * chunk, min(grad.size, (part + 1) * chunk)):
                number = grad[i]
                first[i] += number
                weight[i] += number

    return compile_({1: one, 2: two}[states])
