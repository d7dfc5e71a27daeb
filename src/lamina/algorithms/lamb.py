"""LAMB: Adam whose step is a share of each tensor's norm."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch

from .._util.sharding import wholes_of
from .adam import moments
from .base import Algorithm, Hyper, State, betas, numbers, root, trust_ratio, widen


@final
class LAMB(Algorithm):
    """Layer-wise adaptive moments; for each tensor theta with gradient g.

        m_t     = beta1 * m_{t-1} + (1 - beta1) * g_t
        v_t     = beta2 * v_{t-1} + (1 - beta2) * g_t^2
        r_t     = (m_t / (1 - beta1^t)) / (sqrt(v_t / (1 - beta2^t)) + eps)
        u_t     = r_t + weight_decay * theta_{t-1}
        theta_t = theta_{t-1} - lr * |theta_{t-1}| / |u_t| * u_t

    with the ratio 1 where |theta| or |u| is 0, so that a tensor of zeros can leave zero.

    Args:
        lr: the step as a share of a tensor's norm, >= 0.
        betas: shares of the two running means that are kept at every step, each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: decay of the weights, inside the ratio, >= 0.
        maximize: follow the gradient uphill.

    References:
        You et al. 2020, "Large batch optimization for deep learning: training BERT in 76 minutes",
        algorithm 2 with phi the identity.
    """

    name: ClassVar[str] = "LAMB"
    unit: ClassVar[str] = "tensor"
    defaults: ClassVar[dict[str, Any]] = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "weight_decay": 0.0,
        "maximize": False,
    }
    limits: ClassVar[dict[str, tuple[float, float]]] = {"betas": (0.0, 1.0)}
    options: ClassVar[tuple[str, ...]] = ("maximize",)
    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def update(
        self, param: torch.Tensor, grad: torch.Tensor, state: State, step: int, hyper: Hyper
    ) -> tuple[torch.Tensor, State]:
        """Return one step of LAMB."""
        lr, eps, weight_decay = numbers(hyper, "lr", "eps", "weight_decay")
        beta1, beta2 = betas(hyper)
        grad, wide = widen(-grad if hyper["maximize"] else grad), widen(param)
        mean, square, new = moments(grad, state, hyper)
        denominator = square.sqrt() / root(1 - beta2**step)
        update = mean / (1 - beta1**step) / (denominator + eps)
        if weight_decay:
            update = update + weight_decay * wide
        weight_norm, norm = wholes_of([torch.linalg.vector_norm(each) for each in (wide, update)])
        return -lr * trust_ratio(weight_norm, norm, norm) * update, new
