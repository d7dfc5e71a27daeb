"""Torch's foreach operators: a few calls for a batch, each over all its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, final

import torch

from .._util.tensors import is_dtensor
from ..algorithms.base import HALF, Batch, numbers
from ..algorithms.lamb import LAMB
from ..algorithms.lars import LARS
from ..algorithms.layer_adaptive import LayerAdaptiveAdam
from ..algorithms.muon import Muon
from ..algorithms.rmsprop import RMSprop
from .base import Kernel, begin_momentum, scaled, short, tensor_refusal
from .per_tensor import NORM_RULES, layer_adaptive, muon


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
            if not reason and type(algorithm) is Muon and is_dtensor(param):
                reason = "is a DTensor, which this rule needs as a whole"
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
    lr, weight_decay, momentum = numbers(hyper, "lr", "weight_decay", "momentum")
    alpha, eps = numbers(hyper, "alpha", "eps")
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
    begin_momentum(batch)
    buffers = columns["momentum_buffer"]
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_addcdiv_(buffers, grads, roots)
    torch._foreach_add_(params, buffers, alpha=-lr)


FORMS: dict[type, Callable[[Batch, Any], None]] = {
    RMSprop: _rmsprop,
    LARS: NORM_RULES[LARS].update,
    LAMB: NORM_RULES[LAMB].update,
    LayerAdaptiveAdam: layer_adaptive,
    Muon: muon,
}
