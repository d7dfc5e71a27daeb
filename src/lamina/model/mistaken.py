"""Attributes that look as if they made something train or rest, and do not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

_LIKE_REQUIRES_GRAD = re.compile(r"_*require[sd]?_*grad(s|ients?)?_*", re.IGNORECASE)
#: of a long list, such as a vocabulary, so many items are looked at
_MOST_ITEMS = 1000
#: lists in lists are looked into so deep
_DEPTH = 3


def misspelt_flags(
    model: nn.Module, params: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, str]]:
    """Yield what has an attribute like `requires_grad` under another name, and that name.

    Python lets any attribute be set. What agrees with the flag does no harm and is left out.

    Args:
        model: whose modules are looked at.
        params: its parameters by name.
    """
    for name, param in params:
        for key, value in _misspelt(param):
            if value is not param.requires_grad:
                yield name, key
    for path, module in model.named_modules():
        for key, value in _misspelt(module):
            if any(param.requires_grad is not value for param in module.parameters()):
                yield path or "the model", key


def _misspelt(owner: object) -> list[tuple[str, bool]]:
    return [
        (key, value)
        for key, value in vars(owner).items()
        if isinstance(value, bool)
        if key != "requires_grad" and _LIKE_REQUIRES_GRAD.fullmatch(key)
    ]


def unregistered(model: nn.Module) -> Iterator[tuple[str, frozenset[int]]]:
    """Yield attributes that hold trainable tensors which are no parameters, with their ids.

    They are layers and parameters in a list, tuple, set or dict, where a module does not see them.
    """
    modules = list(model.named_modules())
    known = {id(module) for _, module in modules}
    params: set[int] | None = None
    for path, module in modules:
        for key, value in vars(module).items():
            if key in _REGISTERS or not isinstance(value, (list, tuple, set, dict)):
                continue
            found = {id(each) for each in _trainable(value, known, _DEPTH)}
            if found and params is None:
                params = {id(param) for param in model.parameters()}
            if found and (left := found - (params or set())):
                yield f"{path}.{key}" if path else key, frozenset(left)


_REGISTERS = ("_parameters", "_buffers", "_modules")


def _trainable(value: Any, known: set[int], depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, nn.Parameter):
        if value.requires_grad:
            yield value
    elif isinstance(value, nn.Module):
        if id(value) not in known:
            yield from (param for param in value.parameters() if param.requires_grad)
    elif depth and isinstance(value, (list, tuple, set, dict)):
        items = value.values() if isinstance(value, dict) else value
        for each in islice(items, _MOST_ITEMS):
            yield from _trainable(each, known, depth - 1)
