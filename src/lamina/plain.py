"""What a checkpoint may hold: what `torch.load(path, weights_only=True)` reads back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .errors import StateError

_PLAIN = (bool, int, float, str, bytes, type(None))
#: of a whole number: longer ones are pickled in a form that `weights_only` does not know
_BITS = 2000


def check_given(step: Any, content: Any) -> None:
    """Raise `StateError` for what `save` was not meant for, or could not read back."""
    given = ""
    if type(step) is not int or step < 0:
        given = f"step={step!r}"
    elif not isinstance(content, Mapping):
        given = f"a {type(content).__name__} as content"
    elif "format" in content:
        given = "the key 'format'"
    if given:
        raise StateError(
            f"checkpoint.save was given {given}; expected a whole number of at least 0 as step, "
            "and a dict without 'format', which is lamina's own key."
        )
    with told_deep("content"):
        _check_plain(dict(content), "content")


@contextmanager
def told_deep(place: str) -> Iterator[None]:
    """Turn what is nested without end into an error."""
    try:
        yield
    except RecursionError:
        raise StateError(
            f"{place} is nested in itself, or too deeply to be saved; save plain values and "
            "tensors in few levels."
        ) from None


def _check_plain(value: Any, place: str) -> None:
    """Raise for what `weights_only=True` would refuse to read back."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise StateError(f"{place} has the key {key!r}; expected text or whole numbers.")
            _check_plain(key, f"the key {key!a} of {place}")
            _check_plain(item, f"{place}[{key!a}]")
    elif type(value) in (list, tuple, torch.Size):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]")
    elif type(value) not in (*_PLAIN, torch.Tensor, torch.nn.Parameter):
        raise StateError(
            f"{place} is of type {type(value).__name__}, which a checkpoint cannot hold, since "
            "reading it back could run code; save plain values and tensors."
        )
    elif isinstance(value, torch.Tensor) and vars(value):
        raise StateError(
            f"{place} is a tensor with attributes of its own ({', '.join(vars(value))}), which a "
            "checkpoint cannot hold; save tensor.detach().clone(), and them as plain values."
        )
    elif isinstance(value, int) and value.bit_length() > _BITS:
        raise StateError(
            f"{place} is a number of {value.bit_length():,} bits; expected at most {_BITS:,}."
        )
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise StateError(
                f"{place} is {value!a}, which is no text that can be written."
            ) from None
