"""What third-party optimizers keep, written as plain values and tensors, and read back.

`torch.load(path, weights_only=True)` reads plain values and tensors alone. Some optimizers keep a
queue, a dict by numbers, or a random generator: these are written as a dict with their kind.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ..errors import StateError

#: the key that marks a dict as the written form of something else
KIND = "lamina.kind"
_PLAIN = (bool, int, float, str, bytes, type(None))
_NAMES: dict[Any, str | None] = {each: each.__name__ for each in (dict, list, int, float, set)}
_NAMES[None] = None  # a defaultdict without one
_FACTORIES = {name: factory for factory, name in _NAMES.items()}


class UnwritableError(Exception):
    """A value that has no plain form; the message says what it is."""


def pack(value: Any) -> Any:
    """Return the plain form of a value: containers are new, tensors the live ones.

    Raises:
        UnwritableError: for an object that only its own class could read back.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, torch.Tensor):
        return value.detach() if value.requires_grad or kind is torch.nn.Parameter else value
    if kind in (list, tuple):
        return kind(pack(each) for each in value)
    if kind in (dict, OrderedDict):
        return _packed_dict(value)
    if isinstance(value, np.generic):
        return {KIND: "array", "data": torch.from_numpy(np.array(value)), "number": True}
    if kind not in _WRITERS:
        raise UnwritableError(f"an object of type {kind.__name__}")
    return _WRITERS[kind](value)


def _packed_dict(value: Mapping[Any, Any]) -> dict[Any, Any]:
    if all(type(key) in (str, int) for key in value) and KIND not in value:
        return {key: pack(each) for key, each in value.items()}
    if any(isinstance(key, torch.Tensor) for key in value):
        raise UnwritableError("a dict by tensor")
    return {KIND: "dict", "items": [[pack(key), pack(each)] for key, each in value.items()]}


def _default_dict(value: defaultdict[Any, Any]) -> dict[str, Any]:
    if value.default_factory not in _NAMES:
        raise UnwritableError("a defaultdict with a function of its own")
    name = _NAMES[value.default_factory]
    return {KIND: "defaultdict", "factory": name, "items": _packed_dict(dict(value))}


_WRITERS: dict[type, Callable[[Any], dict[str, Any]]] = {
    deque: lambda v: {KIND: "deque", "items": [*map(pack, v)], "maxlen": v.maxlen},
    set: lambda v: {KIND: "set", "items": [*map(pack, v)]},
    frozenset: lambda v: {KIND: "frozenset", "items": [*map(pack, v)]},
    complex: lambda v: {KIND: "complex", "items": [v.real, v.imag]},
    defaultdict: _default_dict,
    torch.Size: lambda v: {KIND: "size", "items": list(v)},
    torch.dtype: lambda v: {KIND: "dtype", "name": str(v).removeprefix("torch.")},
    torch.device: lambda v: {KIND: "device", "name": str(v)},
    torch.Generator: lambda v: {KIND: "generator", "device": str(v.device), "state": v.get_state()},
    np.ndarray: lambda v: {KIND: "array", "data": torch.from_numpy(v.copy()), "number": False},
}


def unpack(value: Any) -> Any:
    """Return what was packed; containers are new.

    Raises:
        StateError: for a written form that is not one.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(unpack(each) for each in value)
    if not isinstance(value, Mapping):
        return value
    if KIND not in value:
        return {key: unpack(each) for key, each in value.items()}
    if value[KIND] not in _READERS:
        raise StateError(
            f"a saved value is of the unknown kind {value[KIND]!r}; nothing was loaded."
        )
    try:
        return _READERS[value[KIND]](value)
    except Exception as error:
        raise StateError(
            f"a saved value of kind {value[KIND]!r} cannot be read ({type(error).__name__}: "
            f"{error}); nothing was loaded."
        ) from error


def _dtype(value: Mapping[str, Any]) -> torch.dtype:
    found = getattr(torch, value["name"])
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{value['name']!r} is no dtype")
    return found


def _generator(value: Mapping[str, Any]) -> torch.Generator:
    generator = torch.Generator(value["device"])
    generator.set_state(value["state"].cpu())
    return generator


def _array(value: Mapping[str, Any]) -> Any:
    array = value["data"].cpu().numpy().copy()
    return array[()] if value["number"] else array


_READERS: dict[Any, Callable[[Mapping[str, Any]], Any]] = {
    "dict": lambda v: {unpack(key): unpack(each) for key, each in v["items"]},
    "deque": lambda v: deque(map(unpack, v["items"]), v["maxlen"]),
    "set": lambda v: set(map(unpack, v["items"])),
    "frozenset": lambda v: frozenset(map(unpack, v["items"])),
    "complex": lambda v: complex(*v["items"]),
    "defaultdict": lambda v: defaultdict(_FACTORIES[v["factory"]], unpack(v["items"])),
    "size": lambda v: torch.Size(v["items"]),
    "dtype": _dtype,
    "device": lambda v: torch.device(v["name"]),
    "generator": _generator,
    "array": _array,
}


def same(one: Any, other: Any) -> bool:
    """Return whether two packed values are equal, bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (one != one and other != other)
