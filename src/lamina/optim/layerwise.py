"""The optimizers that look at a tensor as a whole: torch's Muon, LARS, LAMB, adaptive Adam."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.optim.optimizer import ParamsT

from ..algorithms import ALGORITHMS
from ..algorithms.base import Method
from .base import DropIn, arguments


class Muon(DropIn):
    """Momentum orthogonalized, for matrices only; arguments and defaults are torch's."""

    algorithm: ClassVar[Method] = ALGORITHMS["Muon"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        foreach: bool | None = None,
        state_dtype: torch.dtype | str | None = None,
        rounding: str | None = None,
    ) -> None:
        super().__init__(**arguments(locals()))


class LARS(DropIn):
    """SGD with momentum whose step is a share of each tensor's norm (You et al. 2017).

    Args:
        params: tensors, or groups of them.
        lr: the global step size; divided by nothing, so 1.0 moves a tensor by
            `trust_coefficient` of its norm in a step.
        momentum: share of the previous change that is kept.
        weight_decay: L2 penalty, counted in the ratio too.
        trust_coefficient: how much of its norm a tensor may move in one step at lr 1.
        eps: added to the denominator of the ratio.
        maximize: follow the gradient uphill.
        foreach: True for foreach operators, False for a loop; the fastest that is exact by default.
        state_dtype: dtype of new state; the parameter's by default.
        rounding: of 16-bit weights: None or "nearest", "stochastic", "kahan", "master".
    """

    algorithm: ClassVar[Method] = ALGORITHMS["LARS"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        state_dtype: torch.dtype | str | None = None,
        rounding: str | None = None,
    ) -> None:
        super().__init__(**arguments(locals()))


class LAMB(DropIn):
    """Adam whose step is a share of each tensor's norm (You et al. 2020).

    Args:
        params: tensors, or groups of them.
        lr: the step as a share of a tensor's norm.
        betas: shares of the two running means that are kept.
        eps: added to the root.
        weight_decay: decay of the weights, inside the ratio.
        maximize: follow the gradient uphill.
        foreach: True for foreach operators, False for a loop; the fastest that is exact by default.
        state_dtype: dtype of new state; the parameter's by default.
        rounding: of 16-bit weights: None or "nearest", "stochastic", "kahan", "master".
    """

    algorithm: ClassVar[Method] = ALGORITHMS["LAMB"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        state_dtype: torch.dtype | str | None = None,
        rounding: str | None = None,
    ) -> None:
        super().__init__(**arguments(locals()))


class LayerAdaptiveAdam(DropIn):
    """Adam's running means with one step size for each tensor.

    The step size of a tensor is `lr * mean(abs(exp_avg) / (sqrt(exp_avg_sq) + eps))`, the update
    `-step_size * exp_avg`, without bias correction.

    Args:
        params: tensors, or groups of them.
        lr: the step size.
        betas: shares of the two running means that are kept.
        eps: added to the root.
        weight_decay: L2 penalty added to the gradient.
        amsgrad: divide by the largest second moment so far.
        maximize: follow the gradient uphill.
        decoupled_weight_decay: decay the weights themselves instead.
        foreach: True for foreach operators, False for a loop; the fastest that is exact by default.
        state_dtype: dtype of new state; the parameter's by default.
        rounding: of 16-bit weights: None or "nearest", "stochastic", "kahan", "master".
    """

    algorithm: ClassVar[Method] = ALGORITHMS["LayerAdaptiveAdam"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        foreach: bool | None = None,
        state_dtype: torch.dtype | str | None = None,
        rounding: str | None = None,
    ) -> None:
        super().__init__(**arguments(locals()))
