"""The algorithms that need a whole tensor, in plain Python floats. Imports no rule of lamina.

Each function is one step for one tensor, given as a list of numbers: `memory` is that tensor's
dictionary, `t` counts from 1.
"""

from __future__ import annotations

from math import fsum, sqrt


def _norm(values) -> float:
    return sqrt(fsum(value * value for value in values))


def lars(
    theta, grad, memory, t, *, lr, momentum, weight_decay, trust_coefficient, eps, maximize
) -> list[float]:
    """You et al. 2017, algorithm 1; ratio 1 where a norm is 0."""
    g = [-each for each in grad] if maximize else list(grad)
    size, slope = _norm(theta), _norm(g)
    local = 1.0
    if size > 0 and slope > 0:
        local = trust_coefficient * size / (slope + weight_decay * size + eps)
    v = memory.get("v", [0.0] * len(theta))
    v = [
        momentum * old + lr * local * (each + weight_decay * w)
        for old, each, w in zip(v, g, theta, strict=True)
    ]
    memory["v"] = v
    return [w - change for w, change in zip(theta, v, strict=True)]


def _moments(g, memory, betas) -> tuple[list[float], list[float]]:
    beta1, beta2 = betas
    m = memory.get("m", [0.0] * len(g))
    v = memory.get("v", [0.0] * len(g))
    memory["m"] = [beta1 * old + (1 - beta1) * each for old, each in zip(m, g, strict=True)]
    memory["v"] = [beta2 * old + (1 - beta2) * each**2 for old, each in zip(v, g, strict=True)]
    return memory["m"], memory["v"]


def lamb(theta, grad, memory, t, *, lr, betas, eps, weight_decay, maximize) -> list[float]:
    """You et al. 2020, algorithm 2; ratio 1 where a norm is 0."""
    m, v = _moments([-each for each in grad] if maximize else grad, memory, betas)
    u = [
        (a / (1 - betas[0] ** t)) / (sqrt(b / (1 - betas[1] ** t)) + eps) + weight_decay * w
        for a, b, w in zip(m, v, theta, strict=True)
    ]
    size, length = _norm(theta), _norm(u)
    ratio = size / length if size > 0 and length > 0 else 1.0
    return [w - lr * ratio * each for w, each in zip(theta, u, strict=True)]


def layer_adaptive(
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
) -> list[float]:
    """size = lr * mean(abs(exp_avg) / (sqrt(exp_avg_sq) + eps)), update -size * exp_avg."""
    g = [-each for each in grad] if maximize else list(grad)
    if not decoupled_weight_decay:
        g = [each + weight_decay * w for each, w in zip(g, theta, strict=True)]
    m, v = _moments(g, memory, betas)
    if amsgrad:
        old = memory.get("largest", v)
        v = memory["largest"] = [max(a, b) for a, b in zip(old, v, strict=True)]
    size = lr * fsum(abs(a) / (sqrt(b) + eps) for a, b in zip(m, v, strict=True))
    size /= max(len(m), 1)
    shrink = lr * weight_decay if decoupled_weight_decay else 0.0
    return [w - size * a - shrink * w for w, a in zip(theta, m, strict=True)]
