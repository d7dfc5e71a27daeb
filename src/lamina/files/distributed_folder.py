"""Reading a folder of `torch.distributed.checkpoint` that may come from anybody.

Torch's own reader unpickles `.metadata` and the values that are no tensors, which runs whatever
code is in them. Here the metadata is parsed as data, every value of it is checked, and torch's
objects are made from that. It names files, places in them and shapes: they are compared with what
is in the folder before memory is taken for them.
"""

from __future__ import annotations

import io
import math
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    _check_box_bounds,
    _check_box_overlap,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from ..errors import StateError, shortened
from .archives import load_plain
from .pickles import Call, Name, parse

_HOME = "torch.distributed.checkpoint.metadata."
_STORED = "torch.distributed.checkpoint.filesystem._StorageInfo"
#: before version 2.4 of torch it lay elsewhere
_PROPERTIES = (
    f"{_HOME}TensorProperties",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
)
_DTYPES = {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}
#: levels of a saved state, and dimensions of a tensor
_DEEPEST = 64
_LARGEST = 2**62
#: letters of a name
_LONGEST = 4096


def unreadable(folder: str | os.PathLike[str], reason: str) -> StateError:
    """Return the error for a folder that is damaged, or was made to do harm."""
    return StateError(f"{folder}: cannot be read ({shortened(reason)}); use another checkpoint.")


class PlainPlanner(DefaultLoadPlanner):
    """Loads what is no tensor as plain values; torch's unpickles it.

    Args:
        folder: the checkpoint, for errors.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put one value into the state."""
        name = read_item.dest_index.fqn
        size = value.getbuffer().nbytes
        self.original_state_dict[name] = load_plain(
            value, size, f"{self._folder}: the saved {name}"
        )


class FolderReader(FileSystemReader):
    """Reads a folder without running what is in it; torch's does the rest.

    Args:
        folder: the checkpoint.

    Raises:
        StateError: if there is none, or its metadata is not as torch writes it.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.folder = Path(folder)
        path = self.folder / ".metadata"
        try:
            with _opened(path) as file:
                self.metadata = _Reading().metadata(parse(file))
        except FileNotFoundError:
            raise StateError(
                f"{folder}: there is no checkpoint of torch.distributed.checkpoint; check the path."
            ) from None
        except (OSError, ValueError) as error:
            raise unreadable(folder, f"its .metadata is damaged: {error}") from error

    def check(self, names: Iterable[str]) -> None:
        """Raise `StateError` unless the folder holds as many bytes as these entries declare."""
        chosen = set(names)
        stored: Mapping[MetadataIndex, _StorageInfo] = self.metadata.storage_data
        counts = Counter(index.fqn for index in stored if index.fqn in chosen)
        try:
            self._check_slices(info for index, info in stored.items() if index.fqn in chosen)
            for name in chosen:
                saved = self.metadata.state_dict_metadata[name]
                if isinstance(saved, TensorStorageMetadata):
                    _check_chunks(name, saved, stored, counts[name])
                elif MetadataIndex(name) not in stored:
                    raise ValueError(f"nothing is stored of {name!r}")
        except ValueError as error:
            raise unreadable(self.folder, str(error)) from error

    def _check_slices(self, infos: Iterable[_StorageInfo]) -> None:
        """Raise for parts of files that lie outside of them, or in each other."""
        by_file: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for info in infos:
            by_file[info.relative_path].append((info.offset, info.offset + info.length))
        for name, slices in by_file.items():
            end = 0
            for begin, following in sorted(slices):
                if begin < end:
                    raise ValueError(f"entries overlap in {name!r}")
                end = following
            with suppress(FileNotFoundError):  # processes may have only the files that they need
                if end > (self.folder / name).stat().st_size:
                    raise ValueError(f"{name!r} is shorter than the metadata says")

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return what was read once."""
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this process needs of the state."""
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self.metadata.storage_data[item.storage_index].relative_path].append(item)
        for name, items in by_file.items():
            with _opened(self.folder / name) as file:
                for item in items:
                    info = self.metadata.storage_data[item.storage_index]
                    self._read_item(item, _Slice(file, info.offset, info.length), planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_item(self, item: ReadItem, content: _Slice, planner: LoadPlanner) -> None:
        buffered = cast("IO[bytes]", io.BufferedReader(content))
        if item.type == LoadItemType.BYTE_IO:
            planner.load_bytes(item, io.BytesIO(buffered.read()))
            return
        name = item.storage_index.fqn
        tensor = load_plain(buffered, content.size, f"{self.folder}: the saved {name}")
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided:
            raise unreadable(self.folder, f"{name!r} is stored as what is no tensor")
        target = planner.resolve_tensor(item).detach()
        rows = zip(item.storage_offsets, item.lengths, strict=True)
        for dim, (offset, length) in enumerate(rows):
            tensor = tensor.narrow(dim, offset, length)
        if target.shape != tensor.shape or target.dtype != tensor.dtype:
            raise unreadable(self.folder, f"{name!r} is stored in another shape or dtype")
        target.copy_(tensor)
        planner.commit_tensor(item, target)


class _Slice(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: IO[bytes], begin: int, size: int) -> None:
        self._file = file
        self._begin = begin
        self._at = 0
        self.size = size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise ValueError(f"a place before the beginning: {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._begin + self._at)
        data = self._file.read(max(min(len(buffer), self.size - self._at), 0))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _opened(path: Path) -> IO[bytes]:
    """Open a file; a pipe or a device in its place would be read without end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("this is no regular file")
    return path.open("rb")


def _check_chunks(
    name: str,
    saved: TensorStorageMetadata,
    stored: Mapping[MetadataIndex, _StorageInfo],
    count: int,
) -> None:
    """Raise unless the stored parts of a tensor are the whole of it, each with all its bytes."""
    if len(saved.chunks) > count:
        raise ValueError(f"{name!r} has more parts than are stored")
    for chunk in saved.chunks:
        info = stored.get(MetadataIndex(name, chunk.offsets))
        if info is None:
            raise ValueError(f"a part of {name!r} is not stored")
        if math.prod(chunk.sizes) * saved.properties.dtype.itemsize > info.length:
            raise ValueError(f"a part of {name!r} has fewer bytes than its shape says")
        dims = {len(chunk.offsets), len(chunk.sizes), len(saved.size)}
        if len(dims) > 1 or not _check_box_bounds(saved.size, chunk):
            raise ValueError(f"a part of {name!r} lies outside of it")
    if sum(math.prod(chunk.sizes) for chunk in saved.chunks) != math.prod(saved.size):
        raise ValueError(f"the stored parts of {name!r} are not the whole")
    if any(_overlaps(saved.chunks)):
        raise ValueError(f"the stored parts of {name!r} overlap")


def _overlaps(chunks: Iterable[ChunkStorageMetadata]) -> Iterator[bool]:
    """Return for pairs of parts whether they overlap; pairs that are far apart are left out."""
    filled = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    if len(filled) < 2:
        return
    dims = range(len(filled[0].sizes))
    # Along the dimension with the most places, few parts lie beside each other.
    along = max(dims, key=lambda dim: len({chunk.offsets[dim] for chunk in filled}))
    beside: list[ChunkStorageMetadata] = []
    for chunk in sorted(filled, key=lambda chunk: chunk.offsets[along]):
        begin = chunk.offsets[along]
        beside = [other for other in beside if other.offsets[along] + other.sizes[along] > begin]
        for other in beside:
            yield _check_box_overlap(chunk, other)
        beside.append(chunk)


class _Reading:
    """Makes torch's metadata from a parsed pickle; each part once, however often it is met."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, Any], Any] = {}

    def metadata(self, value: Any) -> Metadata:
        fields = _fields(value, f"{_HOME}Metadata")
        saved = _mapping(fields.get("state_dict_metadata"))
        places = _mapping(fields.get("planner_data") or {})
        stored = _mapping(fields.get("storage_data"))
        return Metadata(
            {_text(name): self._once(entry, self._entry) for name, entry in saved.items()},
            {_text(name): self._once(place, _path) for name, place in places.items()},
            {self._index(index): self._once(info, _info) for index, info in stored.items()},
        )

    def _once(self, value: Any, make: Any) -> Any:
        # What was parsed lives as long as this, so that no two values have the same id.
        key = id(value), make
        if key not in self._known:
            self._known[key] = make(value)
        return self._known[key]

    def _made(self, value: Any, kind: type[Any], **makers: Callable[[Any], Any]) -> Any:
        """Make an object of torch's from the fields with which it was saved."""
        fields = _fields(value, f"{_HOME}{kind.__name__}")
        return kind(**{key: self._once(fields.get(key), make) for key, make in makers.items()})

    def _entry(self, value: Any) -> Any:
        if isinstance(value, Call) and value.name == f"{_HOME}BytesStorageMetadata":
            return BytesStorageMetadata()
        parts = {"properties": _properties, "size": _size, "chunks": self._chunks}
        return self._made(value, TensorStorageMetadata, **parts)

    def _chunks(self, value: Any) -> list[ChunkStorageMetadata]:
        if type(value) is not list:
            raise ValueError("the parts of a tensor are no list")
        return [self._once(each, self._chunk) for each in value]

    def _chunk(self, value: Any) -> Any:
        return self._made(value, ChunkStorageMetadata, offsets=_size, sizes=_size)

    def _index(self, value: Any) -> Any:
        return self._made(value, MetadataIndex, fqn=_text, offset=_size_or_none)


def _fields(value: Any, *kinds: str) -> Mapping[str, Any]:
    """Return the fields of a dataclass of one of these kinds."""
    if not isinstance(value, Call) or value.name not in kinds or type(value.state) is not dict:
        raise ValueError(f"it has no {kinds[0].rpartition('.')[2]} where one should be")
    return value.state


def _mapping(value: Any) -> dict[Any, Any]:
    if type(value) is not dict:
        raise ValueError("it has no dict where one should be")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > _LONGEST:
        raise ValueError("it has a name that is no text, or a very long one")
    value.encode()  # a lone surrogate could not even be printed
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError("it has a size or a place that is no number of bytes or elements")
    return value


def _size(value: Any) -> torch.Size:
    if not isinstance(value, Call) or value.name != "torch.Size" or len(value.args) != 1:
        raise ValueError("it has no torch.Size where one should be")
    [numbers] = value.args
    if type(numbers) not in (tuple, list) or len(numbers) > _DEEPEST:
        raise ValueError("it has a torch.Size of something else than numbers")
    return torch.Size([_number(each) for each in numbers])


def _size_or_none(value: Any) -> torch.Size | None:
    return None if value is None else _size(value)


def _properties(value: Any) -> TensorProperties:
    """Make the properties of a tensor: of them only the dtype means anything."""
    if not isinstance(value, Call) or value.name not in _PROPERTIES:
        raise ValueError("it has no TensorProperties where they should be")
    dtype = value.state[0] if type(value.state) is tuple and value.state else None
    if not isinstance(dtype, Name) or dtype.text not in _DTYPES:
        raise ValueError("it has no dtype where one should be")
    return TensorProperties(dtype=_DTYPES[dtype.text])


def _path(value: Any) -> tuple[str | int, ...]:
    """Make the place of a value in the saved state: keys, and places in lists."""
    if type(value) is not tuple or not 0 < len(value) <= _DEEPEST:
        raise ValueError("it has a place in the state that is no tuple of a few keys")
    return tuple(_number(part) if type(part) is int else _text(part) for part in value)


def _info(value: Any) -> _StorageInfo:
    """Make the place of an entry: only files of the folder itself are read."""
    fields = _fields(value, _STORED)
    name = _text(fields.get("relative_path"))
    if not name or name in (".", "..") or any(mark in name for mark in "/\\:\0"):
        raise ValueError(f"it names a file outside of the folder: {shortened(repr(name), 60)}")
    if fields.get("transform_descriptors"):
        raise ValueError("its entries are compressed")
    return _StorageInfo(name, _number(fields.get("offset")), _number(fields.get("length")))
