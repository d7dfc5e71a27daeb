"""Torch's fused operators: one call for a batch, one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, final

import torch

from .._util.blocks import is_dense
from .._util.tensors import is_dtensor, waits
from ..algorithms.adam import Adam, AdamW
from ..algorithms.base import HALF, Batch, betas
from ..algorithms.sgd import SGD
from .base import Kernel, missing, scaled, short, tensor_refusal

Operator = Callable[[Batch, list[torch.Tensor], "torch.Tensor | None"], None]


@final
class Fused(Kernel):
    """One C++ call for each batch.

    The operators walk raw memory: on the CPU a gradient whose layout in memory differs from its
    parameter's would silently be read in the wrong order, so layouts are compared here, with the
    gradients' at every step. A clip factor is handed to the operator, which then leaves the scaled
    gradient in `.grad`, as `clip_grad_norm_` does.
    """

    name: ClassVar[str] = "fused"
    about: ClassVar[str] = "torch's fused operator, one pass over memory"
    masks: ClassVar[bool] = True

    def __init__(self, contiguous: bool) -> None:
        """Set `contiguous` for batches of contiguous parameters, whose test is cheap."""
        self._contiguous = contiguous

    def refusal(self, batch: Batch) -> str:
        """Refuse rules without an operator in torch, and memory that it cannot walk."""
        algorithm = type(batch.algorithm)
        if algorithm not in OPERATORS:
            return f"torch has no fused operator for {batch.algorithm.name}"
        for index, param in enumerate(batch.params):
            reason = tensor_refusal(batch, index) or self._layout_refusal(batch, index)
            if not reason and algorithm is SGD:
                reason = _sgd_refusal(param)
            elif not reason:
                reason = step_refusal(param, batch.steps[index])
            if reason:
                return f"{batch.name_of(index)} {reason}"
        return ""

    def _layout_refusal(self, batch: Batch, index: int) -> str:
        param = batch.params[index]
        if self._contiguous:
            return "" if param.is_contiguous() else "is not contiguous"
        return "" if is_dense(param) else "has gaps in memory"

    def ready(self, batch: Batch) -> bool:
        """Accept gradients of the dtype and layout of their parameters."""
        dtype = batch.params[0].dtype
        if self._contiguous:
            for grad in batch.grads:
                if grad.dtype is not dtype or not grad.is_contiguous():
                    return False
            return True
        return all(
            grad.dtype is dtype and grad.layout is torch.strided and grad.stride() == param.stride()
            for param, grad in zip(batch.params, batch.grads, strict=True)
        )

    def run(self, batches: Sequence[Batch]) -> None:
        """Return one call for each batch."""
        inverses: dict[tuple[int, torch.device], torch.Tensor | None] = {}
        for batch in batches:
            grads, inverse, scale = batch.grads, None, batch.scale
            if scale is not None:
                param = batch.params[0]
                if param.dtype is torch.float64 or scale.dtype is not torch.float32:
                    grads = scaled(batch)  # the operators divide by a float32
                else:
                    key = (id(scale), param.device)
                    if key not in inverses:
                        inverses[key] = _inverse(scale, param.device)
                    inverse = inverses[key]
            OPERATORS[type(batch.algorithm)](batch, grads, inverse)


def _inverse(scale: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """Return what the operators divide by; None for 1, if it is known without waiting."""
    if not waits(scale.device) and scale.item() == 1.0:
        return None
    return scale.to(device).reciprocal()


def _adam(batch: Batch, grads: list[torch.Tensor], inverse: torch.Tensor | None) -> None:
    hyper, columns = batch.hyper, batch.columns
    operator = torch._fused_adamw_ if hyper["decoupled_weight_decay"] else torch._fused_adam_
    beta1, beta2 = hyper["betas"]
    if isinstance(beta1, torch.Tensor) or isinstance(beta2, torch.Tensor):
        beta1, beta2 = betas(hyper)
    operator(
        batch.params,
        grads,
        columns["exp_avg"],
        columns["exp_avg_sq"],
        columns["max_exp_avg_sq"] if hyper["amsgrad"] else [],
        batch.steps,
        lr=_on(batch, hyper["lr"]),
        beta1=beta1,
        beta2=beta2,
        weight_decay=hyper["weight_decay"],
        eps=hyper["eps"],
        amsgrad=bool(hyper["amsgrad"]),  # 1 and 0 are as good, but not for torch's operators
        maximize=bool(hyper["maximize"]),
        grad_scale=inverse,
        found_inf=batch.found_inf,
    )


def _sgd(batch: Batch, grads: list[torch.Tensor], inverse: torch.Tensor | None) -> None:
    rests = batch.hyper["momentum"] == 0
    fresh = [] if rests else missing(batch, "momentum_buffer")
    buffers = [] if rests else batch.columns["momentum_buffer"]
    if not fresh:
        _call_sgd(batch, (batch.params, grads, buffers), False, inverse)
        return
    batch.has_new_state = True
    for index in fresh:
        buffers[index] = torch.empty_like(batch.params[index], requires_grad=False)
    rest = sorted(set(range(len(buffers))) - set(fresh))
    for indices, first in ((fresh, True), (rest, False)):
        if indices:  # the flag holds for a whole call, so the two kinds cannot share one
            tensors = [[values[i] for i in indices] for values in (batch.params, grads, buffers)]
            _call_sgd(batch, tensors, first, inverse)


def _call_sgd(
    batch: Batch, tensors: Sequence[list[torch.Tensor]], first: bool, inverse: torch.Tensor | None
) -> None:
    """Update some parameters of a batch: `tensors` are these, their gradients, their buffers."""
    hyper = batch.hyper
    torch._fused_sgd_(
        *tensors,
        weight_decay=hyper["weight_decay"],
        momentum=hyper["momentum"],
        lr=_on(batch, hyper["lr"]),
        dampening=hyper["dampening"],
        nesterov=bool(hyper["nesterov"] and hyper["momentum"]),
        maximize=bool(hyper["maximize"]),
        is_first_step=first,
        grad_scale=inverse,
        found_inf=batch.found_inf,
    )


def _sgd_refusal(param: torch.Tensor) -> str:
    if param.is_cpu and param.dtype in HALF:
        # seen in torch 2.13: all but the last few elements of a tensor stay as they were
        return f"is {short(param.dtype)}, which torch's fused SGD on the CPU gets wrong"
    return "is a DTensor, for which torch's fused SGD is not made" if is_dtensor(param) else ""


def step_refusal(param: torch.Tensor, step: torch.Tensor) -> str:
    """Return why an operator cannot read this step count, or ""."""
    if step.device != param.device:
        return f"is on {param.device} and its step on {step.device}"
    return "" if step.dtype is torch.float32 else f"has a step in {short(step.dtype)}"


OPERATORS: dict[type, Operator] = {Adam: _adam, AdamW: _adam, SGD: _sgd}


def _on(batch: Batch, value: Any) -> Any:
    """Return a hyperparameter that lives on an accelerator, where the parameters are."""
    if isinstance(value, torch.Tensor) and not value.is_cpu:
        return value.to(batch.params[0].device)
    return value
