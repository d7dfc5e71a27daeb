"""The tensors of a step as arrays of numbers, which is what compiled loops are given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..._util.tensors import addresses
from ...algorithms.base import Batch, state_dtype_of
from ...algorithms.rounding import entry_of, has_noisy_state, rounding_of, seed_of
from ...compiled.chunks import ELEMENTS, chunks_of
from ...errors import MismatchError
from .loops import LOOPS

Array = np.ndarray[Any, Any]
#: flags of a tensor: its buffer begins now; its 16-bit weights were changed by others
NEW, FOLLOWED = 1, 2


class Form(NamedTuple):
    """What chooses the machine code: tensors of one form are updated in one call."""

    algorithm: type
    dtype: torch.dtype
    state_dtype: torch.dtype
    #: whether each state tensor takes part, in the order of the algorithm's buffers
    uses: tuple[bool, ...]
    options: tuple[bool, ...]
    rounding: str | None
    has_noisy_state: bool

    @classmethod
    def of(cls, batch: Batch) -> Form:
        """Return the form of a batch, whose tensors are alike."""
        loops, param = LOOPS[type(batch.algorithm)], batch.params[0]
        needs = (loops.needs.get(key) for key in batch.algorithm.buffers)
        return cls(
            type(batch.algorithm),
            param.dtype,
            state_dtype_of(param, batch.hyper),
            tuple(need is None or bool(batch.hyper[need]) for need in needs),
            tuple(bool(batch.hyper[option]) for option in loops.options),
            rounding_of(param, batch.hyper),
            has_noisy_state(param, batch.hyper),
        )

    def elements(self) -> tuple[Any, ...]:
        """Return what a loop is given after the table: an element of each stream, or None."""
        weight, state = ELEMENTS[self.dtype], ELEMENTS[self.state_dtype]
        streams = [weight, weight, *(state if used else None for used in self.uses)]
        return (
            *streams,
            *(True if option else None for option in self.options),
            weight if self.rounding == "kahan" else None,
            np.float32(0) if self.rounding == "master" else None,
            True if self.rounding == "stochastic" else None,
            True if self.has_noisy_state else None,
        )


class Table(NamedTuple):
    """The arrays of loops; see `rules.py`."""

    counter: Array
    chunks: Array
    addresses: Array
    steps: Array
    rows: Array
    settings: Array
    seeds: Array
    flags: Array
    factors: Array


def table_of(form: Form, batches: Sequence[Batch], width: int) -> Table:
    """Put batches of one form into a table; the gradients' addresses are left open.

    Args:
        form: that of the batches.
        batches: one for each row of the settings.
        width: how many settings a row has.

    Raises:
        MismatchError: if state is missing that a loop would read and write.
    """
    _refuse_missing(form, batches)
    keys = (*batches[0].algorithm.buffers, entry_of(form.rounding))
    counts = [len(batch.params) for batch in batches]
    total = sum(counts)
    places = np.zeros((2 + len(keys), total), dtype=np.int64)
    places[0] = _addresses(param for batch in batches for param in batch.params)
    for row, key in enumerate(keys, start=2):
        columns = (batch.columns.get(key or "", [None] * len(batch.params)) for batch in batches)
        places[row] = _addresses(value for column in columns for value in column)
    sizes = [param.numel() for batch in batches for param in batch.params]
    seeds = [seed_of(batch, index) for batch in batches for index in range(len(batch.params))]
    return Table(
        counter=np.zeros(1, dtype=np.int64),
        chunks=chunks_of(sizes),
        addresses=places,
        steps=np.zeros(total, dtype=np.int64),
        rows=np.repeat(np.arange(len(batches)), counts),
        settings=np.zeros((len(batches), width)),
        seeds=np.asarray(seeds, dtype=np.uint32),
        flags=np.zeros(total, dtype=np.uint32),
        factors=np.zeros(total),
    )


def _refuse_missing(form: Form, batches: Sequence[Batch]) -> None:
    used = zip(batches[0].algorithm.buffers, form.uses, strict=True)
    keys = [key for key, is_used in used if is_used]
    if form.rounding in ("kahan", "master"):
        keys.append(entry_of(form.rounding) or "")
    for batch in batches:
        for key in keys:
            for index, value in enumerate(batch.columns.get(key, [None] * len(batch.params))):
                if value is None:
                    raise MismatchError(
                        f"{batch.algorithm.name} needs {key} of {batch.name_of(index)}, which is "
                        "not in its state; nothing was updated. It goes with the settings of the "
                        "group: were they changed by hand in the middle of a step?"
                    )


def check_bounds(table: Table, batches: Sequence[Batch]) -> None:
    """Raise `MismatchError` where a loop would touch what is not memory of its tensor.

    The optimizers have made sure of it before; this is a second look, for tests.
    """
    params = [param for batch in batches for param in batch.params]
    streams = [params, [grad for batch in batches for grad in batch.grads]]
    for key in batches[0].algorithm.tensors:
        columns = (batch.columns.get(key, [None] * len(batch.params)) for batch in batches)
        streams.append([value for column in columns for value in column])
    ends = np.zeros(len(params), dtype=np.int64)
    np.maximum.at(ends, table.chunks[:, 0], table.chunks[:, 2])
    known = set(map(int, table.addresses.ravel()))
    for stream in streams:
        for tensor, end in zip(stream, ends.tolist(), strict=True):
            if tensor is None or not end:
                continue
            room = tensor.untyped_storage().nbytes() // tensor.element_size()
            if tensor.storage_offset() + end > room or tensor.data_ptr() not in known:
                raise MismatchError(
                    f"a tensor of shape {tuple(tensor.shape)} no longer lies where it lay when "
                    "this step was prepared; nothing was updated."
                )


def overlap(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether two of these dense tensors have memory in common."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    begins = np.asarray(addresses(filled), dtype=np.int64)
    ends = begins + np.asarray([tensor.nbytes for tensor in filled], dtype=np.int64)
    order = np.argsort(begins)
    return bool((begins[order][1:] < ends[order][:-1]).any())


def written_by(batch: Batch) -> list[torch.Tensor]:
    """Return the weights and the state of a batch."""
    columns = (value for column in batch.columns.values() for value in column)
    return [*batch.params, *(value for value in columns if value is not None)]


def _addresses(tensors: Iterable[torch.Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
