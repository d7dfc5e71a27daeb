"""Running the gradient operations of each scope, and meeting gradients that are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ..algorithms.base import Batch
from ..errors import NonFiniteError
from ..parameters import ParamInfo
from .norms import all_finite, each_norm
from .operations import Operation, Work

#: the operations of a scope with their numbers at this step
Steps = Sequence[tuple[Operation, float]]


def operate(
    batches: Sequence[Batch], steps: Steps, infos: Mapping[str, ParamInfo], clock: int
) -> torch.Tensor | None:
    """Run a scope's operations over its batches, which then hold the changed gradients.

    Returns:
        The norm of the scope before its first `clip_norm`, or None.

    Raises:
        NonFiniteError: if a norm shows that a gradient is not finite; nothing was changed.
    """
    work = Work(
        [grad for batch in batches for grad in batch.grads],
        [param for batch in batches for param in batch.params],
        [infos[name] for batch in batches for name in batch.names],
    )
    for operation, amount in steps:
        operation.run(work, amount)
    if work.norms and not _all_finite(work.norms):
        raise nonfinite_error(_name_of_worst(batches), clock)
    taken = 0
    for batch in batches:
        count = len(batch.grads)
        batch.grads = work.grads[taken : taken + count]
        batch.scale = work.scale
        taken += count
    return work.norm


def _all_finite(norms: Sequence[torch.Tensor]) -> bool:
    together = sum((norm.to(norms[0].device) for norm in norms[1:]), norms[0])
    return math.isfinite(float(together))


def check_finite(batches: Sequence[Batch], clock: int) -> None:
    """Raise `NonFiniteError` for the first gradient that is not finite, norm or not."""
    for batch in batches:
        for name, grad in zip(batch.names, batch.grads, strict=True):
            if not all_finite(grad):
                raise nonfinite_error(name, clock)


def _name_of_worst(batches: Sequence[Batch]) -> str:
    named = [pair for batch in batches for pair in zip(batch.names, batch.grads, strict=True)]
    for name, grad in named:
        if not all_finite(grad):
            return name
    # Every number is finite, only their squares overflowed.
    wide = [grad.to(torch.promote_types(grad.dtype, torch.float64)) for _, grad in named]
    norms = [float(norm) for norm in each_norm(wide)]
    return named[norms.index(max(norms))][0]


def nonfinite_error(name: str, step: int) -> NonFiniteError:
    """The error for a gradient that must not reach the weights."""
    return NonFiniteError(
        f"the gradient of {name!r} is NaN or infinite at step {step}; the weights were not "
        "changed. Look at the loss of this batch; lower the lr or lengthen the warmup; under "
        "float16 use torch.amp.GradScaler; or skip such steps with Plan(nonfinite='skip')."
    )
