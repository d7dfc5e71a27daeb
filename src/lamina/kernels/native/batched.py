"""A step of all batches by compiled loops."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain, repeat
from operator import attrgetter, is_, is_not, itemgetter
from typing import Any

import numpy as np
import torch

from ..._util.tensors import addresses
from ...algorithms.base import Batch, number
from ...algorithms.sgd import SGD
from ...compiled.loader import loop
from ...compiled.workers import WORKERS
from ..base import begin_momentum
from .arrays import FOLLOWED, NEW, Form, check_bounds, overlap, table_of, written_by
from .loops import LOOPS

_choice, _hyper = attrgetter("kernel"), attrgetter("hyper")
_scale, _grads = attrgetter("scale"), attrgetter("grads")
_PLAIN_NUMBERS = {float, int, bool}

#: whether all addresses are compared with the tensors before each step, for tests and for doubt
CHECK_BOUNDS = bool(os.environ.get("LAMINA_CHECK_BOUNDS"))


class Step:
    """The tables of batches that are updated together, kept until one of their tensors changes."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._choices = list(map(_choice, batches))
        fresh = [set(_begin_momentum(batch)) for batch in batches]
        by_form: dict[Form, list[int]] = {}
        for index, batch in enumerate(batches):
            by_form.setdefault(Form.of(batch), []).append(index)
        # One thread goes through them in order where they have memory in common, as torch does.
        threads = not overlap(chain.from_iterable(map(written_by, batches)))
        self._parts = []
        for form, indices in by_form.items():
            part = Part(form, [batches[index] for index in indices], threads)
            if form.algorithm is SGD:  # whose buffer begins as the gradient; others begin as zeros
                new = [
                    place in fresh[i] for i in indices for place in range(len(batches[i].params))
                ]
                part.table.flags[new] |= NEW
            self._parts.append((indices, part))

    def holds(self, batches: Sequence[Batch]) -> bool:
        """Return whether these are the batches of the tables, with the same tensors.

        A batch gets another choice of its kernel when a tensor of it changes.
        """
        choices = list(map(_choice, batches))
        return len(choices) == len(self._choices) and all(map(is_, choices, self._choices))

    def run(self, batches: Sequence[Batch]) -> bool:
        """Update all batches; return False, and do nothing, if a form of one has changed."""
        works = [(part, [batches[i] for i in indices]) for indices, part in self._parts]
        if not all(part.prepare(its) for part, its in works):
            return False
        for part, its in works:
            part.run(its)
        return True


class Part:
    """The batches of one form."""

    def __init__(self, form: Form, batches: Sequence[Batch], threads: bool) -> None:
        loops = LOOPS[form.algorithm]
        self._form, self._threads = form, threads
        self._elements = form.elements()
        sign = ("maximize",) if "maximize" in batches[0].algorithm.defaults else ()
        #: reads the numbers of a group, and behind them what its form depends on
        self._read = itemgetter(*loops.settings, *loops.needs.values(), *loops.options, *sign)
        self._width = len(loops.settings)
        self._last: list[Any] | None = None
        self._last_kinds: list[Any] | None = None
        self._signs = np.ones(len(batches))
        #: whether the factors of the gradients in the table are others than the signs
        self._was_scaled = True
        values = self._read(batches[0].hyper)[: self._width]
        self.table = table_of(form, batches, 1 + len(loops.numbers(values)))
        self._step_addresses = np.asarray(
            [step.data_ptr() for batch in batches for step in batch.steps], dtype=np.int64
        )
        sizes = [param.numel() for batch in batches for param in batch.params]
        self._sizes = np.asarray(sizes, dtype=np.float64)
        self._total = sum(sizes)
        self._sums = np.zeros((len(self.table.chunks), loops.sums))
        self._totals = np.zeros((len(sizes), loops.sums))

    def prepare(self, batches: Sequence[Batch]) -> bool:
        """Read this step's settings; return whether they go with the form."""
        table = self.table
        given = list(map(self._read, map(_hyper, batches)))
        if not self._are_known(given):
            kinds = [row[self._width :] for row in given]
            if kinds != self._last_kinds:
                if any(Form.of(batch) != self._form for batch in batches):
                    return False
                self._signs[:] = [-1.0 if batch.hyper.get("maximize") else 1.0 for batch in batches]
                self._last_kinds, self._was_scaled = kinds, True
            order = LOOPS[self._form.algorithm].numbers
            rows = [order(row[: self._width]) for row in given]
            plain = {*map(type, chain.from_iterable(rows))} <= _PLAIN_NUMBERS
            table.settings[:, 1:] = rows if plain else [tuple(map(number, row)) for row in rows]
            self._last = given if plain else None  # a tensor may change in place
        scales = list(map(_scale, batches))
        is_scaled = any(map(is_not, scales, repeat(None)))
        if is_scaled or self._was_scaled:
            table.settings[:, 0] = np.multiply(_factors(scales), self._signs)
            self._was_scaled = is_scaled
        table.addresses[1] = addresses([*chain.from_iterable(map(_grads, batches))])
        return True

    def _are_known(self, values: list[Any]) -> bool:
        try:
            return values == self._last
        except RuntimeError:  # a tensor of several numbers
            return False

    def run(self, batches: Sequence[Batch]) -> None:
        """Update the weights and the state."""
        table, loops = self.table, LOOPS[self._form.algorithm]
        if CHECK_BOUNDS:
            check_bounds(table, batches)
        loop("count")(self._step_addresses, table.steps)
        if loops.sums:
            self._call(f"{loops.update}_sums", (table, self._sums))
            loop("sum_chunks")(table.chunks, self._sums, self._totals)
            loop(f"{loops.update}_factors")(table, self._totals, self._sizes)
        self._call(loops.update, (table,))
        flags = table.flags
        if self._form.rounding in ("kahan", "master") and (flags & FOLLOWED).any():
            self._tell_followed(batches)
        flags[:] = 0

    def calls(self) -> dict[str, tuple[Any, ...]]:
        """Return the calls of all loops of this form, in one thread."""
        table, loops = self.table, LOOPS[self._form.algorithm]
        calls: dict[str, tuple[Any, ...]] = {"count": (self._step_addresses, table.steps)}
        if loops.sums:
            calls[f"{loops.update}_sums"] = (table, self._sums, *self._elements)
            calls["sum_chunks"] = (table.chunks, self._sums, self._totals)
            calls[f"{loops.update}_factors"] = (table, self._totals, self._sizes)
        return {**calls, loops.update: (table, *self._elements)}

    def _call(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.table.counter[0] = 0
        elements = self._total if self._threads else 0
        WORKERS.run(loop(name), (*arguments, *self._elements), elements)

    def _tell_followed(self, batches: Sequence[Batch]) -> None:
        tensor = 0
        for batch in batches:
            for index in range(len(batch.params)):
                if self.table.flags[tensor] & FOLLOWED:
                    batch.followed.add(batch.name_of(index))
                tensor += 1


def _begin_momentum(batch: Batch) -> list[int]:
    """Make room for buffers that begin now; return the positions of their parameters."""
    uses = zip(batch.algorithm.buffers, Form.of(batch).uses, strict=True)
    if ("momentum_buffer", True) not in uses:
        return []
    return begin_momentum(batch)


def _factors(scales: Sequence[torch.Tensor | None]) -> list[float]:
    """Return scales as numbers, 1 for None; a tensor is read once for all of its places."""
    keys = list(map(id, scales))
    read = {
        key: 1.0 if each is None else float(each)
        for key, each in dict(zip(keys, scales, strict=True)).items()
    }
    return list(map(read.__getitem__, keys))


def empty_calls(form: Form, batch: Batch) -> dict[str, tuple[Any, ...]]:
    """Return calls of all loops of a form that update nothing, to compile them."""
    nothing = Batch(batch.algorithm, [], [], {}, [], batch.hyper)
    part = Part(form, [nothing], threads=False)
    return part.calls()
