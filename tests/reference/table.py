"""The table that drives what every algorithm promises: adding an optimizer adds its rows here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import scalar


@dataclass(frozen=True)
class Row:
    """An algorithm with options, its oracles, and what its second group changes."""

    name: str
    torch_class: type[torch.optim.Optimizer]
    scalar: Callable[..., float]
    options: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


def _rows(name, torch_class, oracle, second, *options) -> list[Row]:
    return [Row(name, torch_class, oracle, {"lr": 0.01, **each}, second) for each in options]


ROWS = [
    *_rows(
        "SGD",
        torch.optim.SGD,
        scalar.sgd,
        {"lr": 0.03, "weight_decay": 0.2},
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.5, "maximize": True},
    ),
    *_rows(
        "RMSprop",
        torch.optim.RMSprop,
        scalar.rmsprop,
        {"lr": 0.003, "alpha": 0.95, "weight_decay": 0.2},
        {},
        {"weight_decay": 0.1, "eps": 1e-3},
        {"centered": True},
        {"momentum": 0.9},
        {"centered": True, "momentum": 0.5, "maximize": True},
    ),
    *_rows(
        "Adam",
        torch.optim.Adam,
        scalar.adam,
        {"lr": 0.003, "betas": (0.8, 0.95), "weight_decay": 0.2},
        {},
        {"weight_decay": 0.1, "eps": 1e-3},
        {"amsgrad": True},
        {"decoupled_weight_decay": True, "weight_decay": 0.1},
        {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
    ),
    *_rows(
        "AdamW",
        torch.optim.AdamW,
        scalar.adam,
        {"lr": 0.003, "betas": (0.8, 0.95), "weight_decay": 0.2},
        {},
        {"weight_decay": 0.1, "eps": 1e-3},
        {"amsgrad": True, "weight_decay": 0.1},
        {"maximize": True},
    ),
]
