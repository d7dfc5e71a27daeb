"""The table that drives what every algorithm promises: adding an optimizer adds its rows here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import scalar, tensors

Shapes = list[list[tuple[int, ...]]]
#: two groups; sizes around a vector register, a scalar, an empty tensor
SHAPES: Shapes = [[(7, 5), (33,), (1,)], [(4, 3, 2), (), (0,)]]
MATRICES: Shapes = [[(7, 5), (4, 9)], [(6, 6), (1, 3)]]


@dataclass(frozen=True, eq=False)
class Row:
    """An algorithm with options, its oracles, and what its second group changes."""

    name: str
    torch_class: type[torch.optim.Optimizer] | None
    #: the re-write from the paper, for one number or (`whole`) for the numbers of a tensor
    scalar: Callable[..., Any] | None
    options: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] = field(default_factory=dict)
    shapes: Shapes = field(default_factory=lambda: SHAPES)
    whole: bool = False

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


def _rows(name, torch_class, oracle, second, *options, **layout) -> list[Row]:
    return [
        Row(name, torch_class, oracle, {"lr": 0.01, **each}, second, **layout) for each in options
    ]


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
    *_rows(
        "Muon",
        getattr(torch.optim, "Muon", None),  # since 2.9
        None,  # bfloat16 in the middle: no re-write in float64 could say more than torch
        {"lr": 0.003, "momentum": 0.8, "weight_decay": 0.2},
        {},
        {"nesterov": False, "weight_decay": 0.0},
        {"adjust_lr_fn": "match_rms_adamw"},
        {"ns_steps": 3, "ns_coefficients": (3.0, -3.2, 1.2), "adjust_lr_fn": "original"},
        shapes=MATRICES,
    ),
    *_rows(
        "LARS",
        None,
        tensors.lars,
        {"lr": 3.0, "weight_decay": 0.2, "momentum": 0.5},
        {},
        {"lr": 1.0, "weight_decay": 0.1, "trust_coefficient": 0.002, "eps": 1e-3},
        {"lr": 1.0, "momentum": 0.0},
        {"lr": 1.0, "momentum": 0.5, "maximize": True},
        whole=True,
    ),
    *_rows(
        "LAMB",
        None,
        tensors.lamb,
        {"lr": 0.003, "betas": (0.8, 0.95), "weight_decay": 0.2},
        {},
        {"weight_decay": 0.1, "eps": 1e-3},
        {"maximize": True},
        whole=True,
    ),
    *_rows(
        "LayerAdaptiveAdam",
        None,
        tensors.layer_adaptive,
        {"lr": 0.003, "betas": (0.8, 0.95), "weight_decay": 0.2},
        {},
        {"weight_decay": 0.1, "eps": 1e-3},
        {"amsgrad": True},
        {"decoupled_weight_decay": True, "weight_decay": 0.1},
        {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
        whole=True,
    ),
]
#: what has an oracle of each kind
#: those that this version of torch can do
IN_TORCH = [
    row
    for row in ROWS
    if row.torch_class is not None
    and row.options.keys() <= inspect.signature(row.torch_class).parameters.keys()
]
IN_PAPER = [row for row in ROWS if row.scalar is not None]
