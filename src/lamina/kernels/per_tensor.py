"""Foreach forms of the rules that need each tensor's norm; never concatenated, never waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..algorithms.base import Batch, begun_dtype, number, trust_ratio
from ..algorithms.muon import lr_ratio, orthogonalized
from .base import missing

#: elements that all passes of a rule find in the cache: a few arrays of a megabyte
BLOCK = 262_144


def lars(batch: Batch, grads: Any) -> None:
    """One step of LARS."""
    hyper, params = batch.hyper, batch.params
    lr, momentum, weight_decay, trust, eps = (
        number(hyper[key]) for key in ("lr", "momentum", "weight_decay", "trust_coefficient", "eps")
    )
    weights, norms = _norms(params), _norms(grads)
    damped = (norms + weight_decay * weights + eps) / max(trust, 1e-30)
    ratios = trust_ratio(weights, norms, damped).mul_(lr)
    if weight_decay:
        grads = torch._foreach_add(grads, params, alpha=weight_decay)
    changes: Any = torch._foreach_mul(grads, _scalars(ratios))
    if momentum:
        for index in missing(batch, "momentum_buffer"):
            dtype = begun_dtype(params[index], hyper)
            zeros = torch.zeros_like(params[index], dtype=dtype, requires_grad=False)
            batch.columns["momentum_buffer"][index] = zeros
            batch.grown = True
        buffers = batch.columns["momentum_buffer"]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, changes)
        changes = buffers
    torch._foreach_sub_(params, changes)


def lamb(batch: Batch, grads: Any) -> None:
    """One step of LAMB."""
    hyper, params = batch.hyper, batch.params
    lr, eps, weight_decay = (number(hyper[key]) for key in ("lr", "eps", "weight_decay"))
    beta1, beta2 = (number(beta) for beta in hyper["betas"])
    means, squares = _moments(batch, grads, beta1, beta2)
    steps = torch.stack(batch.steps).double()  # 1 - beta^t loses digits in float32
    dtype = params[0].dtype
    corrections = (1 - beta1**steps, torch.rsqrt(1 - beta2**steps))
    first, second = (_scalars(each.to(params[0].device, dtype)) for each in corrections)

    roots = torch._foreach_sqrt(squares)
    torch._foreach_mul_(roots, second)
    torch._foreach_add_(roots, eps)
    torch._foreach_mul_(roots, first)
    updates = torch._foreach_div(means, roots)
    if weight_decay:
        torch._foreach_add_(updates, params, alpha=weight_decay)
    norms = _norms(updates)
    ratios = trust_ratio(_norms(params), norms, norms)
    torch._foreach_mul_(updates, _scalars(ratios.mul_(-lr)))
    torch._foreach_add_(params, updates)


def layer_adaptive(batch: Batch, grads: Any) -> None:
    """One step of LayerAdaptiveAdam."""
    hyper, params = batch.hyper, batch.params
    lr, weight_decay = number(hyper["lr"]), number(hyper["weight_decay"])
    free = _reads_freely(params[0])
    totals: Any = _steadiness_in_blocks(batch, grads) if free else _steadiness(batch, grads)
    if weight_decay and hyper["decoupled_weight_decay"]:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    means, shares = batch.columns["exp_avg"], _shares(params, lr)
    if free:
        for param, mean, total, share in zip(params, means, totals, shares, strict=True):
            param.add_(mean, alpha=share * total)
        return
    sizes = torch._foreach_mul(totals, shares)
    wide = [size.expand_as(mean) for size, mean in zip(sizes, means, strict=True)]
    torch._foreach_addcmul_(params, means, wide)


def _reads_freely(param: torch.Tensor) -> bool:
    """Whether reading a number on the host waits for no device."""
    return param.is_cpu


def _shares(params: Sequence[torch.Tensor], lr: float) -> Any:
    return [-lr / max(param.numel(), 1) for param in params]


def _steadiness(batch: Batch, grads: Any) -> Any:
    """The sum of abs(m) / (sqrt(v) + eps) of each tensor, its moments updated first."""
    hyper = batch.hyper
    weight_decay = number(hyper["weight_decay"])
    beta1, beta2 = (number(beta) for beta in hyper["betas"])
    if weight_decay and not hyper["decoupled_weight_decay"]:
        grads = torch._foreach_add(grads, batch.params, alpha=weight_decay)
    means, squares = _moments(batch, grads, beta1, beta2)
    if hyper["amsgrad"]:
        largest = batch.columns["max_exp_avg_sq"]
        torch._foreach_maximum_(largest, squares)
        squares = largest
    work = torch._foreach_sqrt(squares)
    torch._foreach_add_(work, number(hyper["eps"]))
    return torch._foreach_norm(torch._foreach_div(means, work), 1)


def _steadiness_in_blocks(batch: Batch, grads: Any) -> list[float]:
    """As `_steadiness`, a block at a time: all its passes find their numbers in the cache."""
    hyper, columns = batch.hyper, batch.columns
    coupled = 0.0 if hyper["decoupled_weight_decay"] else number(hyper["weight_decay"])
    eps = number(hyper["eps"])
    beta1, beta2 = (number(beta) for beta in hyper["betas"])
    keys = ("exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * bool(hyper["amsgrad"]))
    totals = []
    for whole in zip(batch.params, grads, *(columns[key] for key in keys), strict=True):
        total = 0.0
        for param, grad, mean, square, *largest in _blocks(whole):
            if coupled:
                grad = grad.add(param, alpha=coupled)
            mean.mul_(beta1).add_(grad, alpha=1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            if largest:
                square = torch.maximum(largest[0], square, out=largest[0])
            work = square.sqrt().add_(eps)
            total += float(torch.div(mean, work, out=work).abs_().sum())
        totals.append(total)
    return totals


def _blocks(tensors: Sequence[torch.Tensor]) -> Any:
    """The same elements of all tensors, a block at a time; tensors with gaps are one block."""
    if tensors[0].numel() <= BLOCK or not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    return zip(*(tensor.view(-1).split(BLOCK) for tensor in tensors), strict=True)


def muon(batch: Batch, grads: Any) -> None:
    """One step of Muon, rounded as torch's: bfloat16 in the middle makes it matter."""
    hyper, params = batch.hyper, batch.params
    lr, weight_decay, momentum = (number(hyper[key]) for key in ("lr", "weight_decay", "momentum"))
    buffers = batch.columns["momentum_buffer"]
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    directions = torch._foreach_lerp(grads, buffers, momentum) if hyper["nesterov"] else buffers
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    for param, direction in zip(params, directions, strict=True):
        ratio = lr_ratio(hyper, param.shape)
        param.add_(orthogonalized(direction, hyper), alpha=-lr * ratio)


def _moments(batch: Batch, grads: Any, beta1: float, beta2: float) -> tuple[Any, Any]:
    """The two running means of Adam, updated in place."""
    means, squares = batch.columns["exp_avg"], batch.columns["exp_avg_sq"]
    torch._foreach_mul_(means, beta1)
    torch._foreach_add_(means, grads, alpha=1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
    return means, squares


def _norms(tensors: Any) -> torch.Tensor:
    """The norm of each tensor, as one vector."""
    return torch.stack(torch._foreach_norm(tensors))


def _scalars(vector: torch.Tensor) -> Any:
    return list(vector.unbind())
