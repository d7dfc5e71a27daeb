"""Adam and AdamW: one rule, two ways to decay the weights."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch

from ..errors import HyperparameterError
from .base import Algorithm, Hyper, State, betas, numbers, root, widen, zeros


def zero_moments(param: torch.Tensor, hyper: Hyper) -> State:
    """Return the state in which `moments` begin."""
    amsgrad = ["max_exp_avg_sq"] if hyper["amsgrad"] else []
    return zeros(param, "exp_avg", "exp_avg_sq", *amsgrad)


def moments(
    grad: torch.Tensor, state: State, hyper: Hyper
) -> tuple[torch.Tensor, torch.Tensor, State]:
    """Return the running means m_t and v_t (amsgrad: the largest v so far), and the new state."""
    beta1, beta2 = betas(hyper)
    mean = beta1 * widen(state["exp_avg"]) + (1 - beta1) * grad
    square = beta2 * widen(state["exp_avg_sq"]) + (1 - beta2) * grad.square()
    new = {"exp_avg": mean, "exp_avg_sq": square}
    if hyper.get("amsgrad"):
        square = torch.maximum(widen(state["max_exp_avg_sq"]), square)
        new["max_exp_avg_sq"] = square
    return mean, square, {**state, **{key: new[key].to(state[key].dtype) for key in new}}


class AdamRule(Algorithm):
    """The rule that Adam and AdamW share: running means, corrected for their start at zero.

        g_t     = grad + weight_decay * theta_{t-1}              (coupled; decoupled: g_t = grad)
        m_t     = beta1 * m_{t-1} + (1 - beta1) * g_t
        v_t     = beta2 * v_{t-1} + (1 - beta2) * g_t^2
        m^_t    = m_t / (1 - beta1^t)
        v^_t    = v_t / (1 - beta2^t)                            (amsgrad: max(v_1 .. v_t) for v_t)
        theta_t = theta_{t-1} - lr * m^_t / (sqrt(v^_t) + eps)   (decoupled: and
                              - lr * weight_decay * theta_{t-1})

    Args:
        lr: the step size, >= 0.
        betas: shares of the two running means that are kept at every step, each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: L2 penalty added to the gradient, or the decay rate of the weights, >= 0.
        amsgrad: divide by the largest v so far.
        maximize: follow the gradient uphill.
        decoupled_weight_decay: decay the weights themselves (AdamW).

    References:
        Kingma and Ba 2015, "Adam: a method for stochastic optimization", algorithm 1; Reddi et al.
        2018, "On the convergence of Adam and beyond", algorithm 2 (amsgrad); Loshchilov and Hutter
        2019, "Decoupled weight decay regularization", algorithm 2 (AdamW).
    """

    limits: ClassVar[dict[str, tuple[float, float]]] = {"betas": (0.0, 1.0)}
    options: ClassVar[tuple[str, ...]] = ("amsgrad", "maximize", "decoupled_weight_decay")
    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    state_options: ClassVar[tuple[str, ...]] = ("amsgrad",)

    def init(self, param: torch.Tensor, hyper: Hyper) -> State:
        """Return zeros."""
        return zero_moments(param, hyper)

    def update(
        self, param: torch.Tensor, grad: torch.Tensor, state: State, step: int, hyper: Hyper
    ) -> tuple[torch.Tensor, State]:
        """Return one step of Adam or AdamW."""
        lr, eps, weight_decay = numbers(hyper, "lr", "eps", "weight_decay")
        beta1, beta2 = betas(hyper)
        decoupled = hyper["decoupled_weight_decay"]

        grad = widen(-grad if hyper["maximize"] else grad)
        if weight_decay and not decoupled:
            grad = grad + weight_decay * widen(param)
        mean, square, new = moments(grad, state, hyper)

        denominator = square.sqrt() / root(1 - beta2**step) + eps
        change = -(lr / (1 - beta1**step)) * mean / denominator
        if weight_decay and decoupled:
            # in this order, and not as lr * weight_decay * param, to round as torch does
            change = ((1 - lr * weight_decay) * widen(param) - widen(param)) + change
        return change, new


@final
class Adam(AdamRule):
    """`AdamRule` with weight decay in the gradient (L2), unless `decoupled_weight_decay`."""

    name: ClassVar[str] = "Adam"
    defaults: ClassVar[dict[str, Any]] = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
        "maximize": False,
        "decoupled_weight_decay": False,
    }


@final
class AdamW(AdamRule):
    """`AdamRule` with weight decay of the weights themselves."""

    name: ClassVar[str] = "AdamW"
    defaults: ClassVar[dict[str, Any]] = {
        **Adam.defaults,
        "weight_decay": 1e-2,
        "decoupled_weight_decay": True,
    }

    def check(self, hyper: Hyper) -> None:
        """Check ranges, and the form of weight decay."""
        super().check(hyper)
        if not hyper.get("decoupled_weight_decay", True):
            raise HyperparameterError(
                "AdamW was given decoupled_weight_decay=False; AdamW is Adam with decoupled "
                "weight decay. Use Adam for the coupled form."
            )
