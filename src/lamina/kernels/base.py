"""What a kernel is: the fast form of update rules, over many tensors of many groups, in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from .._util.blocks import PLAIN
from .._util.tensors import is_dtensor
from ..algorithms.base import Batch, state_dtype_of, times
from ..algorithms.rounding import rounding_of

DEVICES = ("cpu", "cuda", "xpu")


class Kernel(ABC):
    """A way to carry out the update rules of batches; `readable` is the oracle of all others."""

    name: ClassVar[str]
    #: what `kernels.choose` says of it
    about: ClassVar[str]
    #: whether `run` counts the steps itself
    counts_steps: ClassVar[bool] = False
    #: whether `run` itself changes nothing where `found_inf` of a batch is 1
    masks: ClassVar[bool] = False

    def refusal(self, batch: Batch) -> str:
        """Return why this kernel cannot update these tensors exactly, or "" if it can.

        Looks at what stays from step to step: the algorithm, parameters, state and steps.
        """
        return ""

    def ready(self, batch: Batch) -> bool:
        """Return whether the gradients of this step suit too; cheap, as every step asks."""
        return True

    @abstractmethod
    def run(self, batches: Sequence[Batch]) -> None:
        """Update all batches in place; steps include this update, unless `run` counts them."""


def missing(batch: Batch, key: str) -> list[int]:
    """Return the positions whose state `key` does not exist yet; makes room for them."""
    values = batch.columns.setdefault(key, [None] * len(batch.params))
    return [index for index, value in enumerate(values) if value is None]


def begin_momentum(batch: Batch) -> list[int]:
    """Give each parameter without a momentum buffer one of zeros; return their positions."""
    fresh = missing(batch, "momentum_buffer")
    for index in fresh:
        param = batch.params[index]
        dtype = state_dtype_of(param, batch.hyper)
        zeros = torch.zeros_like(param, dtype=dtype, requires_grad=False)
        batch.columns["momentum_buffer"][index] = zeros
        batch.has_new_state = True
    return fresh


def tensor_refusal(batch: Batch, index: int) -> str:
    """Return why torch's operators over lists cannot take this parameter and its state, or ""."""
    param = batch.params[index]
    if not param.is_floating_point():
        return f"is {short(param.dtype)}"
    if param.device.type not in DEVICES:
        return f"is on {param.device.type}"
    if type(param) not in PLAIN and not is_dtensor(param):
        return f"is a {type(param).__name__}"
    if how := rounding_of(param, batch.hyper):
        return f"is {short(param.dtype)} with rounding={how!r}, and torch rounds to the nearest"
    wanted = state_dtype_of(param, batch.hyper)
    if wanted is not param.dtype:
        return f"is {short(param.dtype)} and its state is to be {short(wanted)}"
    for key, values in batch.columns.items():
        value = values[index]
        if value is None:
            continue
        if value.dtype is not param.dtype:
            return f"is {short(param.dtype)} and its {key} {short(value.dtype)}"
        if value.layout is not torch.strided or value.stride() != param.stride():
            return f"and its {key} differ in their layout in memory"
    return ""


def scaled(batch: Batch) -> list[torch.Tensor]:
    """Return the gradients times the clip factor, as new tensors of their dtype (see `times`)."""
    assert batch.scale is not None
    if batch.scale.dtype is not batch.params[0].dtype:
        return [times(grad, batch.scale) for grad in batch.grads]
    return list(torch._foreach_mul(batch.grads, batch.scale.to(batch.params[0].device)))


def short(dtype: torch.dtype) -> str:
    """Return a dtype as people say it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
