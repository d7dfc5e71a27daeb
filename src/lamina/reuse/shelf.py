"""The stored outputs of one call of a module, by example, and the memory they lie in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils._pytree import TreeSpec, tree_flatten

from .keys import as_bytes
from .lazy import TensorForm

#: a piece of memory that rows are stored in is made for about so many bytes
_PIECE = 16 * 2**20


class Room(Protocol):
    """Where memory for rows comes from."""

    def allocate(self, rows: int, width: int) -> torch.Tensor | None:
        """Return bytes of shape (rows, width), or None if there is no room left."""


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
    def tensors(self) -> list[TensorForm]:
        """The forms of its tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorForm)]


class Rows:
    """Rows of bytes of one width, in pieces of memory.

    Args:
        width: the bytes of a row.
        room: where memory comes from.
    """

    def __init__(self, width: int, room: Room) -> None:
        self._width = width
        self._room = room
        self._pieces: list[torch.Tensor] = []
        self._per_piece = max(64, _PIECE // max(1, width))
        self.count = 0

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return sum(piece.numel() for piece in self._pieces)

    def append(self, rows: torch.Tensor) -> bool:
        """Store rows behind the others; return False, with nothing stored, if there is no room."""
        needed = -(-(self.count + len(rows)) // self._per_piece)
        while len(self._pieces) < needed:
            piece = self._room.allocate(self._per_piece, self._width)
            if piece is None:
                return False
            self._pieces.append(piece)
        done = 0
        while done < len(rows):
            piece, place = divmod(self.count, self._per_piece)
            step = min(len(rows) - done, self._per_piece - place)
            self._pieces[piece][place : place + step].copy_(rows[done : done + step])
            done += step
            self.count += step
        return True

    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        """Return the rows of some slots."""
        if len(self._pieces) == 1:
            return self._pieces[0].index_select(0, slots)
        found = torch.empty(len(slots), self._width, dtype=torch.uint8)
        piece_of = slots // self._per_piece
        for piece in piece_of.unique().tolist():
            here = (piece_of == piece).nonzero()[:, 0]
            rows = self._pieces[piece].index_select(0, slots[here] - piece * self._per_piece)
            found.index_copy_(0, here, rows)
        return found


@dataclass
class Shelf:
    """The outputs of one call, for all examples that were seen in batches of one layout.

    Args:
        room: where memory comes from.
        form: of the outputs.
    """

    room: Room
    form: OutputForm
    slots: dict[bytes, int] = field(default_factory=dict)
    _rows: list[Rows | None] = field(default_factory=list)
    _shared: list[torch.Tensor | None] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return sum(rows.size for rows in self._rows if rows is not None)

    def put(self, examples: Sequence[bytes], output: Any) -> bool:
        """Store the outputs of those examples that are not stored yet.

        Returns:
            False if there was no room; what was stored before is still whole.
        """
        new = {one: place for place, one in enumerate(examples) if one not in self.slots}
        if not new:
            return True
        tensors = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, torch.Tensor)]
        if not self._rows:
            self._begin(tensors, len(examples))
        places = torch.tensor(list(new.values()))
        start = len(self.slots)
        for rows, tensor, dim in zip(self._rows, tensors, self.form.dims, strict=True):
            if rows is None or dim is None:
                continue
            rows.count = start  # a row of which only a part found room is written again
            if not rows.append(as_bytes(tensor.detach().movedim(dim, 0).cpu()[places])):
                return False
        for offset, one in enumerate(new):
            self.slots[one] = start + offset
        return True

    def find(self, examples: Sequence[bytes]) -> torch.Tensor | None:
        """Return the slots of some examples; None unless all of them are stored."""
        if not self._rows:
            return None
        found = [self.slots.get(one, -1) for one in examples]
        return None if -1 in found else torch.tensor(found)

    def get(self, slots: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of an output for these examples, new ones each time."""
        forms = zip(self._rows, self._shared, self.form.tensors, self.form.dims, strict=True)
        return [
            shared.clone() if shared is not None else _rebuilt(rows, slots, form, dim)
            for rows, shared, form, dim in forms
        ]

    def _begin(self, tensors: Sequence[torch.Tensor], size: int) -> None:
        for tensor, dim in zip(tensors, self.form.dims, strict=True):
            if dim is None:
                self._rows.append(None)
                self._shared.append(tensor.detach().clone())
            else:
                width = tensor.numel() // size * tensor.element_size()
                self._rows.append(Rows(width, self.room))
                self._shared.append(None)


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
