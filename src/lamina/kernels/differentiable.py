"""The update under autograd: its result can be differentiated, as torch's `differentiable=True`."""

from __future__ import annotations

import torch

from ..algorithms.base import Batch, State
from ..errors import PlanError


def differentiate(batch: Batch) -> None:
    """Update a batch by the readable rule, recorded by autograd.

    Gradients flow to the parameters as they were, to their gradients, and to hyperparameters that
    are tensors. New state takes the place of the old one, which autograd may still need.
    """
    with torch.enable_grad():
        for index, count in enumerate(batch.steps):
            count.detach().add_(1)
            _update(batch, index, int(count))
    batch.has_new_state = True


def _update(batch: Batch, index: int, step: int) -> None:
    param, grad = batch.params[index], batch.grads[index]
    if param.is_leaf and param.requires_grad:
        raise PlanError(
            f"differentiable=True cannot update {batch.name_of(index)}, a leaf of the graph that "
            "requires a gradient; give the optimizer a clone: param.clone(), and set its .grad."
        )
    state: State = {
        key: values[index] for key, values in batch.columns.items() if values[index] is not None
    }
    pairs = param.is_complex()
    if pairs:
        param, grad = torch.view_as_real(param), torch.view_as_real(grad.resolve_conj())
        state = {key: torch.view_as_real(value) for key, value in state.items()}
    # A clone, since the parameter is overwritten while autograd may have kept it.
    change, new = batch.algorithm.update(param.clone(), grad, state, step, batch.hyper)
    param.add_(change)
    for key, value in new.items():
        column = batch.columns.setdefault(key, [None] * len(batch.params))
        column[index] = torch.view_as_complex(value) if pairs else value
