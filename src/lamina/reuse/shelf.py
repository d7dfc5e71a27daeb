"""The stored outputs of one call of a module, by example, and the memory they lie in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten

from .journal import checksum
from .keys import as_bytes
from .lazy import TensorForm

#: a piece of memory that rows are stored in is made for about so many bytes
_PIECE = 4 * 2**20


#: (number of the piece, rows, bytes of a row) -> memory, or None if there is no room left
Allocate = Callable[[int, int, int], torch.Tensor | None]


@dataclass(frozen=True)
class OutputForm:
    """What a call returns: containers, plain values, and the form of every tensor.

    `dims` is the dimension of each tensor that counts the examples; None if it is the same for all.
    """

    structure: TreeSpec
    leaves: tuple[Any, ...]
    dims: tuple[int | None, ...]

    @classmethod
    def of(cls, output: Any, dims: Sequence[int | None]) -> OutputForm:
        """Return the form of an output."""
        leaves, structure = tree_flatten(output)
        forms = tuple(
            TensorForm.of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
        )
        return cls(structure, forms, tuple(dims))

    def filled(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Return the output with these tensors in it."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, TensorForm) else leaf for leaf in self.leaves]
        return self.structure.unflatten(leaves)

    @property
    def is_plain(self) -> bool:
        """Whether it holds nothing but containers, tensors and plain values."""
        plain = (TensorForm, str, int, float, bool, type(None))
        return all(isinstance(leaf, plain) for leaf in self.leaves)

    def widths(self) -> list[int]:
        """Return the bytes of an example in each tensor; 0 for what is the same for all."""
        return [
            0 if dim is None else form.size_in_bytes() // form.shape[dim]
            for form, dim in zip(self.tensors, self.dims, strict=True)
        ]

    @property
    def tensors(self) -> list[TensorForm]:
        """The forms of its tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorForm)]


class Rows:
    """Rows of bytes of one width, in pieces of memory.

    Args:
        width: the bytes of a row.
        allocate: gives memory.
    """

    def __init__(self, width: int, allocate: Allocate) -> None:
        self._width = width
        self._allocate = allocate
        self._pieces: list[torch.Tensor] = []
        self._per_piece = max(64, _PIECE // max(1, width))

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return sum(piece.numel() for piece in self._pieces)

    def grow(self, count: int) -> bool:
        """Make room for so many rows in all; return False if there is none."""
        while len(self._pieces) * self._per_piece < count:
            piece = self._allocate(len(self._pieces), self._per_piece, self._width)
            if piece is None:
                return False
            self._pieces.append(piece)
        return True

    def write(self, first: int, rows: torch.Tensor) -> None:
        """Write rows into slots that there is room for."""
        done = 0
        while done < len(rows):
            piece, place = divmod(first + done, self._per_piece)
            step = min(len(rows) - done, self._per_piece - place)
            self._pieces[piece][place : place + step].copy_(rows[done : done + step])
            done += step

    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        """Return the rows of some slots."""
        if len(self._pieces) == 1:
            return self._pieces[0].index_select(0, slots)
        # Rows are long: copying each in one piece is faster than an index_copy_ byte by byte.
        places = (divmod(slot, self._per_piece) for slot in slots.tolist())
        return torch.stack([self._pieces[piece][place] for piece, place in places])


@dataclass
class Shelf:
    """The outputs of one call, for all examples that were seen in batches of one layout.

    `rows` holds each tensor by example, None for one that is the same for all. Of what another
    process has written, `sums` are the checksums by slot, and `unchecked` the slots that were not
    compared with them yet; `written` is told of new rows, `damaged` if a checksum differs.
    """

    form: OutputForm
    rows: list[Rows | None] = field(default_factory=list)
    slots: dict[bytes, int] = field(default_factory=dict)
    sums: dict[int, list[int]] = field(default_factory=dict)
    unchecked: set[int] = field(default_factory=set)
    written: Callable[[Sequence[bytes], int, Sequence[list[int]]], None] | None = None
    damaged: Callable[[], None] | None = None
    _shared: list[torch.Tensor | None] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return sum(rows.size for rows in self.rows if rows is not None)

    def grow(self, count: int) -> bool:
        """Make room for so many examples in all; return False if there is none."""
        return all(rows.grow(count) for rows in self.rows if rows is not None)

    def put(self, examples: Sequence[bytes], output: Any) -> int:
        """Store the outputs of those examples that are not stored yet.

        Returns:
            How many were stored: none of them if there was no room.
        """
        tensors = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, torch.Tensor)]
        if not self._shared:
            pairs = zip(tensors, self.form.dims, strict=True)
            self._shared = [None if dim is not None else t.detach().clone() for t, dim in pairs]
        new = {one: place for place, one in enumerate(examples) if one not in self.slots}
        first = len(self.slots)
        if not new or not self.grow(first + len(new)):
            return 0
        places = torch.tensor(list(new.values()))
        sums: list[list[int]] = [[] for _ in new]
        for rows, tensor, dim in zip(self.rows, tensors, self.form.dims, strict=True):
            if rows is None or dim is None:
                continue
            data = as_bytes(tensor.detach().movedim(dim, 0)).cpu()[places]
            rows.write(first, data)
            for own, row in zip(sums, data if self.written else (), strict=False):
                own.append(checksum(row))
        self.slots.update(zip(new, range(first, first + len(new)), strict=True))
        if self.written is not None:
            self.written(list(new), first, sums)
        return len(new)

    def find(self, examples: Sequence[bytes]) -> torch.Tensor | None:
        """Return the slots of some examples; None unless all of them are stored and whole."""
        if not self._shared:
            return None
        found = [self.slots.get(one, -1) for one in examples]
        if -1 in found:
            return None
        return torch.tensor(found) if self._check(found) else None

    def get(self, slots: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of an output for these examples, new ones each time."""
        forms = zip(self.rows, self._shared, self.form.tensors, self.form.dims, strict=True)
        return [
            shared.clone() if shared is not None else _rebuilt(rows, slots, form, dim)
            for rows, shared, form, dim in forms
        ]

    def _check(self, slots: Sequence[int]) -> bool:
        """Compare rows of another process with their checksums before their first use."""
        fresh = self.unchecked.intersection(slots)
        if not fresh:
            return True
        rows = [each for each in self.rows if each is not None]
        for slot in fresh:
            parts = [each.gather(torch.tensor([slot]))[0] for each in rows]
            if list(map(checksum, parts)) != self.sums.get(slot):
                if self.damaged is not None:
                    self.damaged()
                # Slots are given out in order, so all of them are written again.
                self.slots.clear()
                self.unchecked.clear()
                return False
        self.unchecked -= fresh
        return True


def _rebuilt(
    rows: Rows | None, slots: torch.Tensor, form: TensorForm, dim: int | None
) -> torch.Tensor:
    assert rows is not None
    assert dim is not None
    shape = list(form.shape)
    shape.insert(0, shape.pop(dim))
    found = rows.gather(slots).view(form.dtype).reshape(shape)
    found = found.movedim(0, dim).to(form.device)
    if found.stride() == form.stride:
        return found
    # Kernels choose by the order of elements in memory, and another kernel gives other bits.
    laid_out = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=form.device)
    return laid_out.copy_(found)
