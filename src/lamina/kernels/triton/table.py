"""What a launch reads: where the tensors of some batches lie, and the numbers of one step.

Everything is a row of 64-bit numbers, in two tensors on the device of the batches. The table of
addresses stays there from step to step. The packet has what is new in each step: the addresses of
the gradients, and the clip factor and the hyperparameters of each group.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from ..._util.tensors import addresses
from ...algorithms.base import Batch
from ...algorithms.rounding import seed_of

#: elements that a program reads at a time
BLOCK = 1024
#: blocks of a chunk, the part of a tensor that one program updates
CHUNK_BLOCKS = 8
#: chunks of the largest tensor, whose sums are read at once; its chunks have more blocks
MOST_CHUNKS = 1024

#: a row of the table: address and number of elements of a parameter, where the packet has its
#: gradient and its group, its first chunk, the number of its chunks and of the blocks in each,
#: its step count, the seed of its random bits, its state, and the state of its rounding
WEIGHT, COUNT, GRAD, GROUP, FIRST, CHUNKS, BLOCKS, STEP, SEED, STATE = range(10)
#: the most state tensors that a rule keeps
STATES = 3
EXTRA = STATE + STATES
WIDTH = EXTRA + 1
#: a group in the packet: addresses of two float32 on the device, or 0; then the hyperparameters,
#: which are float64
SCALE, FOUND_INF, HYPER = range(3)

Array = np.ndarray[Any, np.dtype[np.int64]]


class Table:
    """Where the tensors of some batches lie; made anew when one of them lies elsewhere.

    Args:
        batches: groups that are updated in one launch.
        keys: the names of the state that the rule uses, each in its place, and in the last place
            that of the rounding; None where there is none.
        hypers: how many hyperparameters the rule reads.
    """

    def __init__(self, batches: Sequence[Batch], keys: Sequence[str | None], hypers: int) -> None:
        self._keys = tuple(keys)
        self._hypers = hypers
        self._where = _where(batches, keys)
        self._sizes = _sizes(batches)
        self.device = batches[0].params[0].device
        rows = self._rows(batches)
        self.aligned = not np.bitwise_or.reduce(rows[:, [WEIGHT, *range(STATE, WIDTH)]], None) & 15
        self.programs = int(rows[:, CHUNKS].sum())
        self.rows = _on_device(rows, self.device)
        of_chunks = np.repeat(np.arange(len(rows), dtype=np.int32), rows[:, CHUNKS])
        self.chunks = _on_device(of_chunks, self.device)
        #: two sums for each chunk, for the rules that need norms
        self.sums = torch.empty(2 * self.programs, dtype=torch.float32, device=self.device)
        self._sent: tuple[Array, torch.Tensor] | None = None

    def holds(self, batches: Sequence[Batch], keys: Sequence[str | None]) -> bool:
        """Return whether these are the same tensors, of the same sizes and in the same memory."""
        if tuple(keys) != self._keys or _sizes(batches) != self._sizes:
            return False
        return batches[0].params[0].device == self.device and _where(batches, keys) == self._where

    def _rows(self, batches: Sequence[Batch]) -> Array:
        count = sum(len(batch.params) for batch in batches)
        width = HYPER + self._hypers
        rows = np.zeros((count, WIDTH), dtype=np.int64)
        where = np.array(self._where, dtype=np.int64).reshape(-1, count)
        rows[:, WEIGHT], rows[:, STEP] = where[0], where[1]
        rows[:, STATE:] = where[2:].T
        rows[:, SEED] = [seed_of(batch, i) for batch in batches for i in range(len(batch.params))]
        rows[:, COUNT] = list(chain.from_iterable(self._sizes))
        rows[:, GRAD] = np.arange(count) + width * len(batches)
        lengths = [len(batch.params) for batch in batches]
        rows[:, GROUP] = np.repeat(np.arange(len(batches)), lengths) * width
        rows[:, BLOCKS], rows[:, CHUNKS] = chunks_of(rows[:, COUNT])
        rows[1:, FIRST] = np.cumsum(rows[:, CHUNKS])[:-1]
        return rows

    def packet(
        self,
        scales: Sequence[torch.Tensor | None],
        flags: Sequence[torch.Tensor | None],
        hypers: Sequence[Sequence[Any]],
        grads: Sequence[int],
    ) -> torch.Tensor:
        """Return the numbers of this step on the device; nothing waits for it.

        Args:
            scales: the clip factor of each group, in float32 on the device.
            flags: of each group whether a gradient is not finite, likewise.
            hypers: the hyperparameters of each group; a tensor on the device is copied there.
            grads: where the gradients of all groups lie.
        """
        width = HYPER + self._hypers
        groups = np.zeros((len(hypers), width), dtype=np.int64)
        groups[:, SCALE] = list(map(_address, scales))
        groups[:, FOUND_INF] = list(map(_address, flags))
        on_device = [
            (HYPER + width * row + place, value)
            for row, values in enumerate(hypers)
            for place, value in enumerate(values)
            if isinstance(value, torch.Tensor)
        ]
        groups[:, HYPER:].view(np.float64)[:] = [
            [0.0 if isinstance(value, torch.Tensor) else value for value in values]
            for values in hypers
        ]
        numbers = np.concatenate((groups.reshape(-1), np.array(grads, dtype=np.int64)))
        if self._sent is None or not np.array_equal(self._sent[0], numbers):
            self._sent = (numbers, _on_device(numbers, self.device))
        sent = self._sent[1]
        for place, value in on_device:
            sent.view(torch.float64)[place].copy_(value, non_blocking=True)
        return sent


def chunks_of(sizes: Array) -> tuple[Array, Array]:
    """Return how many blocks are in a chunk of each tensor, and how many chunks there are.

    An empty tensor has no chunk, and none has more than can be summed at once.
    """
    blocks = -(-sizes // BLOCK)
    in_chunk = np.maximum(CHUNK_BLOCKS, -(-blocks // MOST_CHUNKS))
    return in_chunk, -(-blocks // in_chunk)


def _where(batches: Sequence[Batch], keys: Sequence[str | None]) -> list[int]:
    """Return the addresses of all parameters, then of all steps, then of each kind of state."""
    params = chain.from_iterable(batch.params for batch in batches)
    steps = chain.from_iterable(batch.steps for batch in batches)
    found = addresses([*params, *steps])
    unused = [0] * (len(found) // 2)
    for key in keys:
        if key is None:
            found += unused
        else:
            found += addresses([*chain.from_iterable(batch.columns[key] for batch in batches)])
    return found


def _sizes(batches: Sequence[Batch]) -> list[list[int]]:
    return [list(map(torch.Tensor.numel, batch.params)) for batch in batches]


def _address(scalar: torch.Tensor | None) -> int:
    return 0 if scalar is None else scalar.data_ptr()


def float32_on(device: torch.device, scalar: torch.Tensor | None) -> torch.Tensor | None:
    """Return a scalar as the kernels read it; a copy from the device itself waits for nothing."""
    return None if scalar is None else scalar.to(device, torch.float32, non_blocking=True)


def _on_device(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """Copy an array; from pinned memory, which torch keeps until the copy is done."""
    host = torch.from_numpy(array)
    if device.type == "cpu":
        return host.clone()
    return host.pin_memory().to(device, non_blocking=True)
