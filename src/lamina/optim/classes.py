"""The optimizers that update every number by itself; torch's names, signatures, defaults.

`state_dtype` and `rounding` are lamina's own in all of them: float32 state of 16-bit parameters, for
example, and how their new weights are rounded.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.optim.optimizer import ParamsT

from ..algorithms import ALGORITHMS
from ..algorithms.base import Method
from .base import DropIn, arguments


class SGD(DropIn):
    """Stochastic gradient descent with momentum; arguments and defaults are torch's."""

    algorithm: ClassVar[Method] = ALGORITHMS["SGD"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | str | None = None,
        rounding: str | None = None,
    ) -> None:
        super().__init__(**arguments(locals()))


class RMSprop(DropIn):
    """RMSprop; arguments and defaults are torch's."""

    algorithm: ClassVar[Method] = ALGORITHMS["RMSprop"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        state_dtype: torch.dtype | str | None = None,
        rounding: str | None = None,
    ) -> None:
        super().__init__(**arguments(locals()))


class Adam(DropIn):
    """Adam; arguments and defaults are torch's."""

    algorithm: ClassVar[Method] = ALGORITHMS["Adam"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        state_dtype: torch.dtype | str | None = None,
        rounding: str | None = None,
    ) -> None:
        super().__init__(**arguments(locals()))


class AdamW(Adam):
    """Adam with decoupled weight decay; arguments and defaults are torch's."""

    algorithm: ClassVar[Method] = ALGORITHMS["AdamW"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | str | None = None,
        rounding: str | None = None,
    ) -> None:
        super().__init__(**arguments(locals()), decoupled_weight_decay=True)
