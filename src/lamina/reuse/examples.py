"""Which examples a batch holds: by what the user says, or by a hash of the inputs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, default_collate

from .._util.notices import Notices
from ..errors import LaminaError
from .keys import Inputs


@dataclass(frozen=True)
class IndexedBatch:
    """A batch, and the index of each of its examples in the data set."""

    ids: list[int]
    batch: Any

    def pin_memory(self) -> IndexedBatch:
        """Return the batch in pinned memory, as a loader asks for it."""
        from torch.utils.data._utils.pin_memory import pin_memory

        return IndexedBatch(self.ids, pin_memory(self.batch))


class IndexedDataset(Dataset[Any]):
    """A data set whose items say their index, so that reuse need not hash the inputs.

    Args:
        dataset: any data set with `__getitem__` and `__len__`.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> data = IndexedDataset(TensorDataset(torch.arange(4.0)))
        >>> loader = DataLoader(data, batch_size=2, collate_fn=IndexedDataset.collate())
        >>> next(iter(loader)).ids
        [0, 1]
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return int(index), self.dataset[index]

    @staticmethod
    def collate(collate: Callable[[list[Any]], Any] = default_collate) -> IndexedCollate:
        """Return a `collate_fn` for a loader.

        Args:
            collate: makes a batch of items without indices.
        """
        return IndexedCollate(collate)


@dataclass(frozen=True)
class IndexedCollate:
    """Makes an `IndexedBatch` of the items of an `IndexedDataset`."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, items: Sequence[tuple[int, Any]]) -> IndexedBatch:
        """Return the batch."""
        return IndexedBatch(
            [index for index, _ in items], self.collate([item for _, item in items])
        )


class Examples:
    """The names of the examples of the passes that come.

    A name that the user gives stands for the hash of the inputs that came with it, so that what a
    later process finds in a folder is never that of other inputs under the same name. It is trusted
    once the inputs of that example came back the same; one example of each later batch is compared
    again.
    """

    def __init__(self, notices: Notices) -> None:
        self._notices = notices
        self._ids: list[Any] | None = None
        self._hashes: dict[tuple[str, Any], bytes] = {}
        self._trusted: set[tuple[str, Any]] = set()
        self._random = random.Random(0)
        self._use_ids = True
        #: whether the names were found wrong in this very pass
        self.distrusted = False

    @property
    def size(self) -> int | None:
        """How many examples were named; None if none were."""
        return None if self._ids is None else len(self._ids)

    @contextmanager
    def named(self, ids: Iterable[Any]) -> Iterator[None]:
        """Name the examples of the passes inside."""
        given = [one.item() if hasattr(one, "item") else one for one in ids]
        if not all(isinstance(one, (int, str)) for one in given):
            raise LaminaError("ids: expected a number or a text for each example.")
        before, self._ids = self._ids, given
        try:
            yield
        finally:
            self._ids = before

    def identify(self, inputs: Inputs, layout: str) -> list[bytes]:
        """Return what identifies each example of a pass."""
        self.distrusted = False
        if self._ids is None or not self._use_ids:
            return inputs.examples()
        names = [(layout, one) for one in self._ids]
        if self._trusted.issuperset(names):
            place = self._random.randrange(len(names))
            same = inputs.examples([place])[0] == self._hashes[names[place]]
        else:
            found = inputs.examples()
            pairs = list(zip(names, found, strict=True))
            same = all(self._hashes.get(name, hashed) == hashed for name, hashed in pairs)
            self._trusted.update(name for name in names if name in self._hashes)
            self._hashes.update(pairs)
        if same:
            return [self._hashes[name] for name in names]
        self._use_ids = False
        self.distrusted = True
        self._notices.tell(
            "An example came with other inputs than before under the same index: random "
            "augmentation, or an index that stands for several examples. Inputs are hashed "
            "instead; what changes from epoch to epoch is computed again."
        )
        return inputs.examples()
