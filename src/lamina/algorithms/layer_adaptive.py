"""LayerAdaptiveAdam: one step size for each tensor, from how steady its gradients are."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch

from .._util.sharding import whole_of
from .adam import Adam, moments, zero_moments
from .base import Algorithm, Hyper, State, numbers, widen


@final
class LayerAdaptiveAdam(Algorithm):
    """Momentum whose step size for each tensor is the mean size of Adam's steps in it.

        g_t     = grad + weight_decay * theta_{t-1}              (coupled; decoupled: g_t = grad)
        m_t     = beta1 * m_{t-1} + (1 - beta1) * g_t
        v_t     = beta2 * v_{t-1} + (1 - beta2) * g_t^2          (amsgrad: max(v_1 .. v_t) for v_t)
        size_t  = lr * mean(|m_t| / (sqrt(v_t) + eps))           (one number for each tensor)
        theta_t = theta_{t-1} - size_t * m_t                     (decoupled: and
                              - lr * weight_decay * theta_{t-1})

    m and v are Adam's without bias correction. The mean is taken in one tensor at a time: over
    several tensors together it would be another algorithm.

    Args:
        lr: the step size, >= 0.
        betas: shares of the two running means that are kept at every step, each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: L2 penalty added to the gradient, or the decay rate of the weights, >= 0.
        amsgrad: divide by the largest v so far.
        maximize: follow the gradient uphill.
        decoupled_weight_decay: decay the weights themselves, at the rate lr * weight_decay.

    m and v: Kingma and Ba 2015, "Adam: a method for stochastic optimization", algorithm 1.
    """

    name: ClassVar[str] = "LayerAdaptiveAdam"
    unit: ClassVar[str] = "tensor"
    defaults: ClassVar[dict[str, Any]] = Adam.defaults
    limits: ClassVar[dict[str, tuple[float, float]]] = Adam.limits
    options: ClassVar[tuple[str, ...]] = Adam.options
    buffers: ClassVar[tuple[str, ...]] = Adam.buffers
    state_options: ClassVar[tuple[str, ...]] = Adam.state_options

    def init(self, param: torch.Tensor, hyper: Hyper) -> State:
        """Return zeros."""
        return zero_moments(param, hyper)

    def update(
        self, param: torch.Tensor, grad: torch.Tensor, state: State, step: int, hyper: Hyper
    ) -> tuple[torch.Tensor, State]:
        """Return one step."""
        lr, eps, weight_decay = numbers(hyper, "lr", "eps", "weight_decay")
        decoupled = hyper["decoupled_weight_decay"]

        grad, wide = widen(-grad if hyper["maximize"] else grad), widen(param)
        if weight_decay and not decoupled:
            grad = grad + weight_decay * wide
        mean, square, new = moments(grad, state, hyper)

        # In full: with a sum still to be reduced, the product would gather the mean.
        total = whole_of((mean.abs() / (square.sqrt() + eps)).sum())
        size = lr * total / max(mean.numel(), 1)
        change = -size * mean
        if weight_decay and decoupled:
            change = ((1 - lr * weight_decay) * wide - wide) + change  # to round as kernels do
        return change, new
