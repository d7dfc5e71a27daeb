"""Files of `torch.save`, read with `weights_only=True` after a look at what that would cost.

`weights_only` keeps a file from running code, but not from taking a thousand times its size of
memory, or from ending the process by nesting.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import StateError
from .pickles import parse
from .plain import check_size, check_values, parts_of

#: how many pickles stand before the bytes in the form of torch.save that is no archive
_LEGACY_PICKLES = 5
#: bytes that a tensor may have beyond those of its file, as an expanded one has
_SPARE = 2**26


def load_plain(file: IO[bytes], size: int, place: str, path: Path | None = None) -> Any:
    """Load tensors, on the CPU, and plain values.

    Args:
        file: seekable, with nothing but what `torch.save` wrote.
        size: its bytes.
        place: the file, for errors.
        path: the same file, if it has a path: torch reads it faster by that.

    Raises:
        StateError: if it is damaged, holds more than that, or would take more memory than its size.
    """
    try:
        _check_archive(file, size, place)
        file.seek(0)
        with warnings.catch_warnings():  # of what a foreign file is: the error says it
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path or file, map_location="cpu", weights_only=True)
    except (OSError, StateError):
        raise
    except Exception as error:  # whatever a foreign or malicious file brings about
        raise StateError(
            f"{place}: this is no checkpoint: it is not a torch file, or holds more than tensors "
            "and plain values, which could run code and is therefore not opened. Check the path, "
            "or save state_dict()s only."
        ) from error
    check_size(content, place)
    _check_tensors(content, size, place)
    check_values(content, place)
    return content


def _check_tensors(content: Any, size: int, place: str) -> None:
    """Raise `StateError` for a tensor whose copy would be much larger than the file.

    With a stride of 0 one saved number may stand for any count of elements.
    """
    stack, seen = [content], set()
    while stack:
        each = stack.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        stack += parts_of(each)
        if isinstance(each, torch.Tensor) and _bytes_of(each) > size + _SPARE:
            raise StateError(
                f"{place}: it holds a tensor of {_bytes_of(each):,} bytes, and has only {size:,}: "
                "the same numbers stand in it again and again. Save a part of it, or a clone."
            )


def _bytes_of(tensor: torch.Tensor) -> int:
    """Return the bytes of a copy; 0 for what has no elements in this sense."""
    plain = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_meta)
    return tensor.numel() * tensor.element_size() if plain else 0


def _check_archive(file: IO[bytes], size: int, place: str) -> None:
    """Raise `StateError` for what would take more memory than the size of the file.

    Neither torch nor lamina compresses: an archive that does, or whose records overlap, was made to
    take a thousand times its size of memory when it is read.
    """
    file.seek(0)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        file.seek(0)
        for _ in range(_LEGACY_PICKLES):
            parse(file)
        return
    with archive:
        records = archive.infolist()
        packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
        if packed or sum(record.file_size for record in records) > size:
            raise StateError(
                f"{place}: this is no checkpoint: it is compressed, or its records overlap, so "
                "that it holds more than its size; torch and lamina write neither. Save it again "
                "with torch.save if you trust it."
            )
        for record in records:
            if record.filename.endswith("data.pkl"):
                parse(io.BytesIO(archive.read(record)))
