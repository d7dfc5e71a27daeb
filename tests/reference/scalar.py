"""The algorithms from their papers, one number at a time in float64. Imports no rule of lamina.

Each function is one step for one number: `memory` is that number's dictionary, `t` counts from 1.
"""

from __future__ import annotations

from math import sqrt


def sgd(
    theta, grad, memory, t, *, lr, momentum, dampening, weight_decay, nesterov, maximize
) -> float:
    """Sutskever et al. 2013, in the form of torch: the learning rate outside the velocity."""
    g = (-grad if maximize else grad) + weight_decay * theta
    if momentum == 0:
        return theta - lr * g
    if "velocity" in memory:
        memory["velocity"] = momentum * memory["velocity"] + (1 - dampening) * g
    else:
        memory["velocity"] = g
    if nesterov:
        return theta - lr * (g + momentum * memory["velocity"])
    return theta - lr * memory["velocity"]


def rmsprop(
    theta, grad, memory, t, *, lr, alpha, eps, weight_decay, momentum, centered, maximize
) -> float:
    """Hinton's lecture 6.5; Graves 2013, equations 38 to 41, for the centered form."""
    g = (-grad if maximize else grad) + weight_decay * theta
    memory["n"] = alpha * memory.get("n", 0.0) + (1 - alpha) * g * g
    variance = memory["n"]
    if centered:
        memory["g"] = alpha * memory.get("g", 0.0) + (1 - alpha) * g
        variance -= memory["g"] ** 2
    memory["delta"] = momentum * memory.get("delta", 0.0) + g / (sqrt(variance) + eps)
    return theta - lr * memory["delta"]


def adam(
    theta,
    grad,
    memory,
    t,
    *,
    lr,
    betas,
    eps,
    weight_decay,
    amsgrad,
    maximize,
    decoupled_weight_decay,
) -> float:
    """Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2; Reddi et al."""
    beta1, beta2 = betas
    g = -grad if maximize else grad
    if not decoupled_weight_decay:
        g += weight_decay * theta
    memory["m"] = beta1 * memory.get("m", 0.0) + (1 - beta1) * g
    memory["v"] = beta2 * memory.get("v", 0.0) + (1 - beta2) * g * g
    v = memory["v"]
    if amsgrad:
        v = memory["v_max"] = max(memory.get("v_max", 0.0), v)
    m_hat = memory["m"] / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    shrink = lr * weight_decay * theta if decoupled_weight_decay else 0.0
    return theta - lr * m_hat / (sqrt(v_hat) + eps) - shrink
