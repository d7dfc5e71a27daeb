"""RMSprop: gradients divided by a running root mean square."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch

from .base import Algorithm, Hyper, State, number, numbers, widen, zeros


@final
class RMSprop(Algorithm):
    """Gradients divided by the root of a running mean of their squares.

        g_t     = grad + weight_decay * theta_{t-1}
        v_t     = alpha * v_{t-1} + (1 - alpha) * g_t^2
        a_t     = alpha * a_{t-1} + (1 - alpha) * g_t
        w_t     = v_t - a_t^2                                  (centered; else w_t = v_t)
        u_t     = g_t / (sqrt(w_t) + eps)
        b_t     = momentum * b_{t-1} + u_t
        theta_t = theta_{t-1} - lr * b_t

    Args:
        lr: the step size, >= 0.
        alpha: share of the running means that is kept at every step, >= 0.
        eps: added to the root, >= 0.
        weight_decay: L2 penalty added to the gradient, >= 0.
        momentum: share of the previous direction that is kept, >= 0.
        centered: divide by an estimate of the standard deviation instead.
        maximize: follow the gradient uphill.

    References:
        Tieleman and Hinton 2012, "Neural Networks for Machine Learning", lecture 6.5; centered:
        Graves 2013, "Generating sequences with recurrent neural networks", equations 38-45.
    """

    name: ClassVar[str] = "RMSprop"
    defaults: ClassVar[dict[str, Any]] = {
        "lr": 1e-2,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "centered": False,
        "maximize": False,
    }
    options: ClassVar[tuple[str, ...]] = ("centered", "maximize")
    buffers: ClassVar[tuple[str, ...]] = ("square_avg", "momentum_buffer", "grad_avg")
    state_options: ClassVar[tuple[str, ...]] = ("centered",)

    def init(self, param: torch.Tensor, hyper: Hyper) -> State:
        """Return zeros; a buffer only with a momentum."""
        keys = ["square_avg"]
        if number(hyper["momentum"]) > 0:
            keys.append("momentum_buffer")
        if hyper["centered"]:
            keys.append("grad_avg")
        return zeros(param, *keys)

    def update(
        self, param: torch.Tensor, grad: torch.Tensor, state: State, step: int, hyper: Hyper
    ) -> tuple[torch.Tensor, State]:
        """Return one step of RMSprop."""
        lr, weight_decay, momentum = numbers(hyper, "lr", "weight_decay", "momentum")
        alpha, eps = numbers(hyper, "alpha", "eps")
        grad = widen(-grad if hyper["maximize"] else grad)
        if weight_decay:
            grad = grad + weight_decay * widen(param)
        new = {"square_avg": alpha * widen(state["square_avg"]) + (1 - alpha) * grad.square()}
        variance = new["square_avg"]
        if hyper["centered"]:
            new["grad_avg"] = alpha * widen(state["grad_avg"]) + (1 - alpha) * grad
            variance = variance - new["grad_avg"].square()
        direction = grad / (variance.sqrt() + eps)
        if momentum:
            old = state.get("momentum_buffer")  # None if the momentum was 0 until now
            direction = direction if old is None else momentum * widen(old) + direction
            new["momentum_buffer"] = direction
        dtype = state["square_avg"].dtype
        return -lr * direction, {**state, **{key: new[key].to(dtype) for key in new}}
