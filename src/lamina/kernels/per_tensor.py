"""Foreach forms of the rules that need each tensor's norm; never concatenated, never waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .._util.blocks import in_blocks
from .._util.sharding import wholes_of
from .._util.tensors import is_dtensor, waits
from ..algorithms.base import Batch, betas, number, numbers, trust_ratio
from ..algorithms.lamb import LAMB
from ..algorithms.lars import LARS
from ..algorithms.layer_adaptive import LayerAdaptiveAdam
from ..algorithms.muon import lr_ratio, orthogonalized
from .base import begin_momentum

#: elements that all passes of a rule find in the cache: a few arrays of a megabyte
BLOCK = 262_144


class NormRule(NamedTuple):
    """A rule in two parts, with the norms of each whole tensor between them.

    `prepare` and `finish` go by elements, so that both may be given parts of tensors.
    """

    #: what norm it is
    order: float
    #: the work of the first part, from a batch and its gradients; updates their moments
    prepare: Callable[[Batch, Any], Any]
    #: the lists of tensors whose norms are needed, from the batch and that work
    measured: Callable[[Batch, Any], Sequence[Any]]
    #: a number for each tensor, from these norms and the numbers of elements
    factors: Callable[[Batch, list[torch.Tensor], Sequence[int]], Any]
    #: the update, from the work and the factors
    finish: Callable[[Batch, Any, Any], None]

    def norms(self, batch: Batch, work: Any) -> list[torch.Tensor]:
        """Return the norms that are needed, each as one vector over the tensors.

        Of sharded tensors they are those of the whole, and all come with one collective.
        """
        measured = self.measured(batch, work)
        found = [norm for each in measured for norm in torch._foreach_norm(each, self.order)]
        return list(torch.stack(wholes_of(found)).split([len(each) for each in measured]))

    def update(self, batch: Batch, grads: Any) -> None:
        """Update whole tensors."""
        work = self.prepare(batch, grads)
        counts = [param.numel() for param in batch.params]
        self.finish(batch, work, self.factors(batch, self.norms(batch, work), counts))


def _lars_factors(batch: Batch, norms: list[torch.Tensor], counts: Sequence[int]) -> Any:
    lr, weight_decay = numbers(batch.hyper, "lr", "weight_decay")
    trust, eps = numbers(batch.hyper, "trust_coefficient", "eps")
    weights, slopes = norms
    damped = (slopes + weight_decay * weights + eps) / max(trust, 1e-30)
    return trust_ratio(weights, slopes, damped).mul_(lr).unbind()


def _lars_finish(batch: Batch, grads: Any, factors: Any) -> None:
    params = batch.params
    weight_decay, momentum = numbers(batch.hyper, "weight_decay", "momentum")
    if weight_decay:
        grads = torch._foreach_add(grads, params, alpha=weight_decay)
    changes: Any = torch._foreach_mul(grads, factors)
    if momentum:
        begin_momentum(batch)
        buffers = batch.columns["momentum_buffer"]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, changes)
        changes = buffers
    torch._foreach_sub_(params, changes)


def _lamb_directions(batch: Batch, grads: Any) -> Any:
    hyper, params = batch.hyper, batch.params
    eps, weight_decay = numbers(hyper, "eps", "weight_decay")
    beta1, beta2 = betas(hyper)
    means, squares = _moments(batch, grads)
    steps = torch.stack(batch.steps).double()  # 1 - beta^t loses digits in float32
    dtype = params[0].dtype
    corrections = (1 - beta1**steps, torch.rsqrt(1 - beta2**steps))
    first, second = (each.to(params[0].device, dtype).unbind() for each in corrections)

    roots = torch._foreach_sqrt(squares)
    torch._foreach_mul_(roots, second)
    torch._foreach_add_(roots, eps)
    torch._foreach_mul_(roots, first)
    directions = torch._foreach_div(means, roots)
    if weight_decay:
        torch._foreach_add_(directions, params, alpha=weight_decay)
    return directions


def _lamb_factors(batch: Batch, norms: list[torch.Tensor], counts: Sequence[int]) -> Any:
    weights, lengths = norms
    return trust_ratio(weights, lengths, lengths).mul_(-number(batch.hyper["lr"])).unbind()


def _lamb_finish(batch: Batch, directions: Any, factors: Any) -> None:
    torch._foreach_mul_(directions, factors)
    torch._foreach_add_(batch.params, directions)


def layer_adaptive(batch: Batch, grads: Any) -> None:
    """Return one step of LayerAdaptiveAdam."""
    if not _reads_freely(batch.params[0]):
        NORM_RULES[LayerAdaptiveAdam].update(batch, grads)
        return
    params, lr = batch.params, number(batch.hyper["lr"])
    totals = _steadiness_in_blocks(batch, grads)
    _decay(batch)
    counts = [param.numel() for param in params]
    means, shares = batch.columns["exp_avg"], _shares(counts, lr)
    for param, mean, total, share in zip(params, means, totals, shares, strict=True):
        param.add_(mean, alpha=share * total)


def _decay(batch: Batch) -> None:
    lr, weight_decay = numbers(batch.hyper, "lr", "weight_decay")
    if weight_decay and batch.hyper["decoupled_weight_decay"]:
        torch._foreach_mul_(batch.params, 1 - lr * weight_decay)


def _layer_adaptive_factors(batch: Batch, norms: list[torch.Tensor], counts: Sequence[int]) -> Any:
    return torch._foreach_mul(norms[0].unbind(), _shares(counts, number(batch.hyper["lr"])))


def _layer_adaptive_finish(batch: Batch, work: Any, factors: Any) -> None:
    _decay(batch)
    means = batch.columns["exp_avg"]
    if is_dtensor(batch.params[0]):  # whose parts cannot be expanded to the shape of the whole
        torch._foreach_add_(batch.params, torch._foreach_mul(means, factors))
        return
    wide = [factor.expand_as(mean) for factor, mean in zip(factors, means, strict=True)]
    torch._foreach_addcmul_(batch.params, means, wide)


def _reads_freely(param: torch.Tensor) -> bool:
    """Return whether reading a number on the host waits for no device, and for no process."""
    return not waits(param.device) and not is_dtensor(param)


def _shares(counts: Sequence[int], lr: float) -> Any:
    return [-lr / max(count, 1) for count in counts]


def _steadiness(batch: Batch, grads: Any) -> Any:
    """Return the quotients m / (sqrt(v) + eps), the moments updated first."""
    hyper = batch.hyper
    weight_decay = number(hyper["weight_decay"])
    if weight_decay and not hyper["decoupled_weight_decay"]:
        grads = torch._foreach_add(grads, batch.params, alpha=weight_decay)
    means, squares = _moments(batch, grads)
    if hyper["amsgrad"]:
        largest = batch.columns["max_exp_avg_sq"]
        torch._foreach_maximum_(largest, squares)
        squares = largest
    work = torch._foreach_sqrt(squares)
    torch._foreach_add_(work, number(hyper["eps"]))
    return torch._foreach_div(means, work)


def _steadiness_in_blocks(batch: Batch, grads: Any) -> list[float]:
    """Return the sums of abs(`_steadiness`), a block at a time: all passes find it in the cache."""
    hyper, columns = batch.hyper, batch.columns
    coupled = 0.0 if hyper["decoupled_weight_decay"] else number(hyper["weight_decay"])
    eps = number(hyper["eps"])
    beta1, beta2 = betas(hyper)
    keys = ("exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * bool(hyper["amsgrad"]))
    totals = []
    for whole in zip(batch.params, grads, *(columns[key] for key in keys), strict=True):
        total = 0.0
        for param, grad, mean, square, *largest in in_blocks(whole, BLOCK):
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


def muon(batch: Batch, grads: Any) -> None:
    """Return one step of Muon, rounded as torch's: bfloat16 in the middle makes it matter."""
    hyper, params = batch.hyper, batch.params
    lr, weight_decay = numbers(hyper, "lr", "weight_decay")
    directions = muon_directions(batch, grads)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    for param, direction in zip(params, directions, strict=True):
        ratio = lr_ratio(hyper, param.shape)
        param.add_(orthogonalized(direction, hyper), alpha=-lr * ratio)


def muon_directions(batch: Batch, grads: Any) -> Any:
    """Update the momentum of Muon; return what is to be orthogonalized."""
    momentum, buffers = number(batch.hyper["momentum"]), batch.columns["momentum_buffer"]
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    return torch._foreach_lerp(grads, buffers, momentum) if batch.hyper["nesterov"] else buffers


def _moments(batch: Batch, grads: Any) -> tuple[Any, Any]:
    """Return the two running means of Adam, updated in place."""
    beta1, beta2 = betas(batch.hyper)
    means, squares = batch.columns["exp_avg"], batch.columns["exp_avg_sq"]
    torch._foreach_mul_(means, beta1)
    torch._foreach_add_(means, grads, alpha=1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
    return means, squares


NORM_RULES: dict[type, NormRule] = {
    LARS: NormRule(
        order=2,
        prepare=lambda batch, grads: grads,
        measured=lambda batch, grads: (batch.params, grads),
        factors=_lars_factors,
        finish=_lars_finish,
    ),
    LAMB: NormRule(
        order=2,
        prepare=_lamb_directions,
        measured=lambda batch, directions: (batch.params, directions),
        factors=_lamb_factors,
        finish=_lamb_finish,
    ),
    LayerAdaptiveAdam: NormRule(
        order=1,
        prepare=_steadiness,
        measured=lambda batch, quotients: (quotients,),
        factors=_layer_adaptive_factors,
        finish=_layer_adaptive_finish,
    ),
}
