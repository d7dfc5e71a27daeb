"""What a checkpoint may hold: what `torch.load(path, weights_only=True)` reads back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import StateError, shortened

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
    elif isinstance(value, str) and not is_writable(value):
        raise StateError(f"{place} is {value!a}, which is no text that can be written.")


#: how many values a state may hold, each counted as often as it is met: one that trains a hundred
#: thousand parameters holds a million
_MOST_VALUES = 10_000_000


def check_size(value: Any, place: str) -> None:
    """Raise `StateError` if walking through nested values would take without end.

    A list may stand in another one many times, that one in a third and so on: a file of 2 kB then
    holds more values than there are atoms. Each object is looked at once here.

    Args:
        value: what a file held.
        place: the file, for the error.
    """
    sizes: dict[int, float] = {}
    entered: set[int] = set()
    stack: list[tuple[Any, bool]] = [(value, False)]
    while stack:
        each, is_done = stack.pop()
        if id(each) in sizes:
            continue
        parts = parts_of(each)
        if is_done:
            # What contains itself is not done yet, and counts as one value there.
            sizes[id(each)] = 1.0 + sum(sizes.get(id(part), 1.0) for part in parts)
        elif id(each) not in entered:
            entered.add(id(each))
            stack.append((each, True))
            stack += [(part, False) for part in parts if id(part) not in sizes]
    if sizes[id(value)] > _MOST_VALUES:
        raise StateError(
            f"{place}: it holds more than {_MOST_VALUES:,} values, since its lists stand in each "
            "other again and again. No optimizer's state is like that, and it is not read."
        )


def check_values(value: Any, place: str, numbers: bool = True) -> None:
    """Raise `StateError` for texts and numbers that could be loaded, but not be saved again.

    Args:
        value: a state, of whatever form; each object in it is looked at once.
        place: what it is, for the error.
        numbers: whether to look at numbers too.
    """
    stack, seen = [value], set()
    while stack:
        each = stack.pop()
        if type(each) is int:
            if numbers and each.bit_length() > _BITS:
                raise StateError(
                    f"{place} has a number of {each.bit_length():,} bits in it; expected at most "
                    f"{_BITS:,}. It was damaged, or changed by hand; use another one."
                )
        elif type(each) is str:
            if not is_writable(each):
                raise StateError(
                    f"{place} has the text {shortened(ascii(each), 60)} in it, which cannot be "
                    "written. It was damaged, or changed by hand; use another one."
                )
        elif id(each) not in seen:
            seen.add(id(each))
            stack += parts_of(each)


def is_writable(text: str) -> bool:
    """Return whether a text can be encoded: lone surrogates cannot."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def parts_of(value: Any) -> list[Any]:
    """Return the values that lie in a value, keys of dicts included."""
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else []
