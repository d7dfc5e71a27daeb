"""The kernel that is always there: a loop over the pure rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import torch

from ..algorithms.base import Batch, State, widen
from .base import Kernel


@final
class Readable(Kernel):
    """One tensor at a time, in any dtype, layout and mixture. Slow: every term is a new tensor."""

    name: ClassVar[str] = "readable"
    about: ClassVar[str] = "the update rule as written, one tensor at a time"

    def refusal(self, batch: Batch) -> str:
        """Nothing is refused."""
        return ""

    def ready(self, batch: Batch) -> bool:
        """Any gradient."""
        return True

    def run(self, batches: Sequence[Batch]) -> None:
        """The rule for each tensor; its result is written into the live tensors."""
        for batch in batches:
            for index, step in enumerate(_counts(batch.steps)):
                _update(batch, index, step)


def _counts(steps: list[torch.Tensor]) -> list[int]:
    """The step counts as integers; those on an accelerator are read in one go."""
    if any(not step.is_cpu for step in steps):
        return [int(step) for step in torch.stack([s.to(steps[0].device) for s in steps]).tolist()]
    return [int(step) for step in steps]


def _update(batch: Batch, index: int, step: int) -> None:
    param, grad = batch.params[index], batch.grads[index]
    state: State = {
        key: values[index] for key, values in batch.columns.items() if values[index] is not None
    }
    pairs = param.is_complex() and not grad.is_sparse  # sparse only meets rules that are linear
    if pairs:
        param, grad = torch.view_as_real(param), torch.view_as_real(grad.resolve_conj())
        state = {key: torch.view_as_real(value) for key, value in state.items()}
    if batch.scale is not None:
        grad = widen(grad) * batch.scale.to(grad.device)
    change, new = batch.algorithm.update(param, grad, state, step, batch.hyper)
    param.add_(change)
    for key, value in new.items():
        old = state.get(key)
        if old is None or (value.is_sparse and value is not old):
            batch.columns.setdefault(key, [None] * len(batch.params))
            batch.columns[key][index] = torch.view_as_complex(value) if pairs else value
            batch.grown = True
        elif value is not old:
            old.copy_(value)
