"""Stochastic gradient descent, with momentum."""

from __future__ import annotations

import math
from typing import Any, ClassVar, final

import torch

from ..errors import HyperparameterError
from .base import Algorithm, Hyper, State, number, numbers, state_dtype_of, widen


@final
class SGD(Algorithm):
    """Stochastic gradient descent, with momentum (Polyak) or Nesterov's accelerated gradient.

        g_t     = grad + weight_decay * theta_{t-1}
        b_t     = momentum * b_{t-1} + (1 - dampening) * g_t        (b_t = g_t if there is no b yet)
        theta_t = theta_{t-1} - lr * b_t                            (plain: g_t)
        theta_t = theta_{t-1} - lr * (g_t + momentum * b_t)         (nesterov)

    Args:
        lr: the step size, >= 0.
        momentum: share of the previous direction that is kept, >= 0. While it is 0 the buffer
            rests; it is created by the first update with a momentum.
        dampening: share of the gradient that is left out of the buffer.
        weight_decay: L2 penalty added to the gradient, >= 0.
        nesterov: look ahead along the buffer; needs a momentum and no dampening.
        maximize: follow the gradient uphill.

    References:
        Polyak 1964, "Some methods of speeding up the convergence of iteration methods"; Sutskever
        et al. 2013, "On the importance of initialization and momentum in deep learning". As in
        torch, lr multiplies the whole buffer, where Sutskever et al. put it inside.
    """

    name: ClassVar[str] = "SGD"
    defaults: ClassVar[dict[str, Any]] = {
        "lr": 1e-3,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "maximize": False,
    }
    limits: ClassVar[dict[str, tuple[float, float]]] = {"dampening": (-math.inf, math.inf)}
    options: ClassVar[tuple[str, ...]] = ("nesterov", "maximize")
    sparse: ClassVar[bool] = True
    buffers: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def check(self, hyper: Hyper) -> None:
        """Check ranges, and what Nesterov's form needs."""
        super().check(hyper)
        momentum, dampening = (number(hyper.get(key, 0.0)) for key in ("momentum", "dampening"))
        if hyper.get("nesterov") and (momentum <= 0 or dampening != 0):
            raise HyperparameterError(
                f"SGD was given nesterov=True with momentum={momentum:g} and "
                f"dampening={dampening:g}; Nesterov's form needs momentum > 0 and dampening 0."
            )

    def init(self, param: torch.Tensor, hyper: Hyper) -> State:
        """Return nothing: the buffer begins as a gradient, so it cannot exist before one."""
        return {}

    def update(
        self, param: torch.Tensor, grad: torch.Tensor, state: State, step: int, hyper: Hyper
    ) -> tuple[torch.Tensor, State]:
        """Return one step of SGD."""
        lr, weight_decay = numbers(hyper, "lr", "weight_decay")
        momentum, dampening = numbers(hyper, "momentum", "dampening")
        direction = widen(-grad if hyper["maximize"] else grad)
        if weight_decay:
            direction = direction + weight_decay * widen(param)
        if momentum:
            old = state.get("momentum_buffer")
            if old is None:
                buffer = direction.clone()
            else:
                buffer = momentum * widen(old) + (1 - dampening) * direction
            dtype = state_dtype_of(param, hyper) if old is None else old.dtype
            state = {**state, "momentum_buffer": buffer.to(dtype)}
            direction = direction + momentum * buffer if hyper["nesterov"] else buffer
        return -lr * direction, state
