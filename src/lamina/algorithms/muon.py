"""Muon: momentum, orthogonalized, for the matrices inside a network."""

from __future__ import annotations

import math
from typing import Any, ClassVar, final

import torch

from .._util.sharding import laid_out_as, whole_of
from .._util.tensors import is_dtensor
from .base import Algorithm, Hyper, State, number, numbers, widen


@final
class Muon(Algorithm):
    """Momentum orthogonalized by Newton-Schulz steps; for each matrix theta of A x B numbers.

    A tensor of more dimensions, such as the weight of a convolution, is the matrix of its first
    dimension and all others.

        b_t     = momentum * b_{t-1} + (1 - momentum) * g_t
        u_t     = b_t                            (nesterov: (1 - momentum) * g_t + momentum * b_t)
        o_t     = NS(u_t), about U V' of the singular value decomposition u_t = U S V'
        theta_t = (1 - lr * weight_decay) * theta_{t-1} - lr * ratio * o_t

    NS: x = u / |u|, then `ns_steps` times  x = a x + (b x x' + c (x x')^2) x,  in bfloat16.
    ratio: sqrt(max(1, A / B)), or 0.2 sqrt(max(A, B)) for adjust_lr_fn="match_rms_adamw".

    Args:
        lr: the step size, >= 0.
        weight_decay: decay rate of the weights, >= 0.
        momentum: share of the previous direction that is kept, >= 0.
        nesterov: look ahead along the buffer.
        ns_coefficients: a, b, c.
        eps: smallest norm to divide by, >= 0.
        ns_steps: number of Newton-Schulz steps, 1 to 99.
        adjust_lr_fn: None, "original" (the same) or "match_rms_adamw" (to reuse AdamW's lr).

    References:
        Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al.
        2025, "Muon is scalable for LLM training", equation 4.
    """

    name: ClassVar[str] = "Muon"
    unit: ClassVar[str] = "tensor"
    defaults: ClassVar[dict[str, Any]] = {
        "lr": 1e-3,
        "weight_decay": 0.1,
        "momentum": 0.95,
        "nesterov": True,
        "ns_coefficients": (3.4445, -4.7750, 2.0315),
        "eps": 1e-7,
        "ns_steps": 5,
        "adjust_lr_fn": None,
    }
    limits: ClassVar[dict[str, tuple[float, float]]] = {
        "ns_coefficients": (-math.inf, math.inf),
        "ns_steps": (1, 100),
    }
    counts: ClassVar[tuple[str, ...]] = ("ns_steps",)
    options: ClassVar[tuple[str, ...]] = ("nesterov", "adjust_lr_fn")
    buffers: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "adjust_lr_fn": (None, "original", "match_rms_adamw")
    }

    def refusal(self, param: torch.Tensor) -> str:
        """Refuse what is no real matrix, which cannot be orthogonalized."""
        if why := super().refusal(param):
            return why
        if param.is_complex():
            return "is complex, and Muon is for real matrices; give it another optimizer"
        if param.ndim < 2:
            return (
                f"has shape {tuple(param.shape)}, and Muon is for matrices and convolutions; give "
                "biases, norms and scalars another optimizer, such as AdamW"
            )
        return ""

    def update(
        self, param: torch.Tensor, grad: torch.Tensor, state: State, step: int, hyper: Hyper
    ) -> tuple[torch.Tensor, State]:
        """Return one step of Muon."""
        lr, weight_decay, momentum = numbers(hyper, "lr", "weight_decay", "momentum")
        old = state["momentum_buffer"]
        grad = widen(grad).to(widen(old).dtype)
        # lerp and not the sum above, to round as torch does: bfloat16 follows
        buffer = torch.lerp(widen(old), grad, 1 - momentum)
        direction = torch.lerp(grad, buffer, momentum) if hyper["nesterov"] else buffer
        direction = lr_ratio(hyper, param.shape) * orthogonalized(direction, hyper).to(grad.dtype)
        wide = widen(param)
        change = ((1 - lr * weight_decay) * wide - wide) - lr * direction
        return change, {**state, "momentum_buffer": buffer.to(old.dtype)}


def orthogonalized(direction: torch.Tensor, hyper: Hyper) -> torch.Tensor:
    """Return the result of the Newton-Schulz iteration, in bfloat16, in the shape of the tensor.

    A sharded tensor is gathered once, as otherwise every product of the iteration would gather it.
    """
    if is_dtensor(direction):
        return laid_out_as(orthogonalized(whole_of(direction.bfloat16()), hyper), direction)
    a, b, c = (number(each) for each in hyper["ns_coefficients"])
    shape, matrix = direction.shape, direction.flatten(1)
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.bfloat16()
    x = x.T if tall else x
    del direction, matrix  # a caller that keeps neither gets their memory back
    x = x / x.norm().clamp(min=number(hyper["eps"]))
    for _ in range(int(hyper["ns_steps"])):
        gram = x @ x.T
        gram = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, gram, x, beta=a)
    return (x.T if tall else x).reshape(shape)


def lr_ratio(hyper: Hyper, shape: torch.Size) -> float:
    """Return what the learning rate of a matrix is multiplied by."""
    rows, columns = shape[0], math.prod(shape[1:])
    if hyper["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / max(columns, 1)))
