"""Torch's foreach operators: a few calls for a batch, each over all its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, final

import torch

from .._util.tensors import is_dtensor
from ..algorithms.base import HALF, Batch, number, state_dtype_of
from ..algorithms.lamb import LAMB
from ..algorithms.lars import LARS
from ..algorithms.layer_adaptive import LayerAdaptiveAdam
from ..algorithms.muon import Muon
from ..algorithms.rmsprop import RMSprop
from . import per_tensor
from .base import Kernel, missing, scaled, short, tensor_refusal


@final
class Foreach(Kernel):
    """A few calls for each batch, each over all its tensors; for rules without a fused operator."""

    name: ClassVar[str] = "foreach"
    about: ClassVar[str] = "torch's foreach operators, a few passes over memory"

    def refusal(self, batch: Batch) -> str:
        """Refuse what has a fused operator, and dtypes that foreach rounds."""
        algorithm = batch.algorithm
        if type(algorithm) not in FORMS:
            return f"there is no foreach form of {algorithm.name}"
        for index, param in enumerate(batch.params):
            reason = tensor_refusal(batch, index)
            if not reason and param.dtype in HALF:
                reason = f"is {short(param.dtype)}, which foreach rounds after every operation"
            if not reason and algorithm.unit == "tensor" and is_dtensor(param):
                reason = "is a DTensor, whose norm is that of all its shards"
            if reason:
                return f"{batch.name_of(index)} {reason}"
        return ""

    def ready(self, batch: Batch) -> bool:
        """Accept dense gradients of the dtype of their parameters."""
        dtype = batch.params[0].dtype
        return all(grad.dtype is dtype and grad.layout is torch.strided for grad in batch.grads)

    def run(self, batches: Sequence[Batch]) -> None:
        """Run about ten calls for each batch."""
        for batch in batches:
            grads: Any = batch.grads if batch.scale is None else scaled(batch)
            if batch.hyper.get("maximize"):
                grads = torch._foreach_neg(grads)
            FORMS[type(batch.algorithm)](batch, grads)


def _rmsprop(batch: Batch, grads: Any) -> None:
    hyper, columns, params = batch.hyper, batch.columns, batch.params
    lr, alpha, eps, weight_decay, momentum = (
        number(hyper[key]) for key in ("lr", "alpha", "eps", "weight_decay", "momentum")
    )
    if weight_decay:
        grads = torch._foreach_add(grads, params, alpha=weight_decay)

    squares = columns["square_avg"]
    torch._foreach_mul_(squares, alpha)
    torch._foreach_addcmul_(squares, grads, grads, value=1 - alpha)
    if hyper["centered"]:
        means = columns["grad_avg"]
        torch._foreach_lerp_(means, grads, 1 - alpha)
        roots = torch._foreach_addcmul(squares, means, means, value=-1)
        torch._foreach_sqrt_(roots)
    else:
        roots = torch._foreach_sqrt(squares)
    torch._foreach_add_(roots, eps)

    if not momentum:
        torch._foreach_addcdiv_(params, grads, roots, value=-lr)
        return
    for index in missing(batch, "momentum_buffer"):
        dtype = state_dtype_of(params[index], hyper)
        zeros = torch.zeros_like(params[index], dtype=dtype, requires_grad=False)
        columns["momentum_buffer"][index] = zeros
        batch.has_new_state = True
    buffers = columns["momentum_buffer"]
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_addcdiv_(buffers, grads, roots)
    torch._foreach_add_(params, buffers, alpha=-lr)


FORMS: dict[type, Callable[[Batch, Any], None]] = {
    RMSprop: _rmsprop,
    LARS: per_tensor.lars,
    LAMB: per_tensor.lamb,
    LayerAdaptiveAdam: per_tensor.layer_adaptive,
    Muon: per_tensor.muon,
}
