"""Loaders whose batches say which examples of the data set they hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset


@dataclass(frozen=True)
class NamedBatch:
    """A batch, and what names each of its examples; None if an index of the task's cannot."""

    names: list[str] | None
    batch: Any

    def to(self, device: Any, non_blocking: bool = False) -> NamedBatch:
        """Return the batch on a device, as Accelerate's loader asks for it."""
        from accelerate.utils import send_to_device

        return NamedBatch(self.names, send_to_device(self.batch, device, non_blocking))

    def pin_memory(self) -> NamedBatch:
        """Return the batch in pinned memory, as torch's loader asks for it."""
        from torch.utils.data._utils.pin_memory import pin_memory

        return NamedBatch(self.names, pin_memory(self.batch))


def named_loader(loader: DataLoader[Any], part: str) -> DataLoader[Any]:
    """Return a loader of the same batches, drawn by the same sampler, that name their examples.

    Args:
        loader: of a task; it stays as it is.
        part: of the data, such as "train", whose indices are its own.

    Returns:
        The loader itself if its examples have no indices: a stream, or a data set that makes the
        batches itself.
    """
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return loader
    named = copy.copy(loader)
    # torch refuses this in a loader, whose workers may have the other data set; this one has none.
    vars(named)["dataset"] = _NamedItems(loader.dataset)
    vars(named)["_iterator"] = None
    named.collate_fn = _Collate(loader.collate_fn, part)
    return named


class _NamedItems(Dataset[Any]):
    """A data set whose items come with their index; everything else is that of the data set."""

    def __init__(self, dataset: Any) -> None:
        vars(self)["dataset"] = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> tuple[Any, Any]:
        return index, self.dataset[index]

    @property
    def __getitems__(self) -> Callable[[Sequence[Any]], list[tuple[Any, Any]]] | None:
        """What fetches a whole batch; None, which a loader takes as not there, if it is not."""
        fetch = getattr(self.dataset, "__getitems__", None)
        if fetch is None:
            return None
        return lambda indices: list(zip(indices, fetch(indices), strict=True))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dataset" not in vars(self):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Pass on what a task's `worker_init_fn` sets."""
        setattr(self.dataset, name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


@dataclass(frozen=True)
class _Collate:
    """Makes a `NamedBatch` of the items of `_NamedItems`."""

    collate: Callable[[list[Any]], Any]
    part: str

    def __call__(self, items: Sequence[tuple[Any, Any]]) -> NamedBatch:
        batch = self.collate([item for _, item in items])
        names = [self._name(index) for index, _ in items]
        known = [name for name in names if name is not None]
        return NamedBatch(known if len(known) == len(names) else None, batch)

    def _name(self, index: Any) -> str | None:
        """Return the name of an example; None if its index may hold more than which it is."""
        if isinstance(index, str):
            return f"{self.part} {index!r}"
        return f"{self.part} {int(index)}" if hasattr(index, "__index__") else None
