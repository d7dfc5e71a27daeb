"""LARS: SGD with momentum whose step is a share of each tensor's norm."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch

from .._util.sharding import wholes_of
from .base import Algorithm, Hyper, State, numbers, state_dtype_of, trust_ratio, widen


@final
class LARS(Algorithm):
    """Layer-wise adaptive rate scaling; for each tensor theta with gradient g.

        ratio_t = trust_coefficient * |theta_{t-1}| / (|g_t| + weight_decay * |theta_{t-1}| + eps)
        v_t     = momentum * v_{t-1} + lr * ratio_t * (g_t + weight_decay * theta_{t-1})
        theta_t = theta_{t-1} - v_t

    with ratio_t = 1 where |theta| or |g| is 0, so that a tensor of zeros can leave zero.

    Args:
        lr: the global step size, >= 0.
        momentum: share of the previous change that is kept, >= 0. lr is inside the buffer, as in
            the paper, so that a change of lr acts on new gradients only.
        weight_decay: L2 penalty added to the gradient, >= 0.
        trust_coefficient: how much of its norm a tensor may move in one step at lr 1, >= 0.
        eps: added to the denominator of the ratio, >= 0.
        maximize: follow the gradient uphill.

    References:
        You, Gitman and Ginsburg 2017, "Large batch training of convolutional networks", equation 6
        and algorithm 1.
    """

    name: ClassVar[str] = "LARS"
    unit: ClassVar[str] = "tensor"
    defaults: ClassVar[dict[str, Any]] = {
        "lr": 1.0,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "trust_coefficient": 1e-3,
        "eps": 1e-8,
        "maximize": False,
    }
    options: ClassVar[tuple[str, ...]] = ("maximize",)
    buffers: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def init(self, param: torch.Tensor, hyper: Hyper) -> State:
        """Return zeros; nothing without a momentum."""
        return {} if hyper["momentum"] == 0 else super().init(param, hyper)

    def update(
        self, param: torch.Tensor, grad: torch.Tensor, state: State, step: int, hyper: Hyper
    ) -> tuple[torch.Tensor, State]:
        """Return one step of LARS."""
        lr, momentum, weight_decay = numbers(hyper, "lr", "momentum", "weight_decay")
        trust, eps = numbers(hyper, "trust_coefficient", "eps")
        grad, wide = widen(-grad if hyper["maximize"] else grad), widen(param)
        weight_norm, grad_norm = wholes_of(
            [torch.linalg.vector_norm(each) for each in (wide, grad)]
        )
        damped = (grad_norm + weight_decay * weight_norm + eps) / max(trust, 1e-30)
        ratio = trust_ratio(weight_norm, grad_norm, damped)
        if weight_decay:
            grad = grad + weight_decay * wide
        change = lr * ratio * grad
        if momentum:
            old = state.get("momentum_buffer")  # None if the momentum was 0 until now
            dtype = state_dtype_of(param, hyper) if old is None else old.dtype
            change = change if old is None else momentum * widen(old) + change
            state = {**state, "momentum_buffer": change.to(dtype)}
        return -change, state
