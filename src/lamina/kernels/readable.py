"""The kernel that is always there: a loop over the pure rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch

from .._util.blocks import PLAIN, block_length, in_blocks
from .._util.tensors import waits
from ..algorithms.base import Batch, State, times, widen
from ..algorithms.rounding import RoundedPart, Rounder, has_rounder
from .base import Kernel


@final
class Readable(Kernel):
    """One tensor at a time, in any dtype, layout and mixture. Slow: every term is a new tensor."""

    name: ClassVar[str] = "readable"
    about: ClassVar[str] = "the update rule as written, one tensor at a time"

    def run(self, batches: Sequence[Batch]) -> None:
        """Return the rule for each tensor; its result is written into the live tensors."""
        for batch in batches:
            for index, step in enumerate(_counts(batch.steps)):
                _update(batch, index, step)


def _counts(steps: list[torch.Tensor]) -> list[Any]:
    """Return the step counts as integers; those on an accelerator stay there, in float64.

    Python computes `beta ** step` in float64; reading the count would wait for the device.
    """
    return [step.double() if waits(step.device) else int(step) for step in steps]


def _update(batch: Batch, index: int, step: Any) -> None:
    param, grad = batch.params[index], batch.grads[index]
    state: State = {
        key: values[index] for key, values in batch.columns.items() if values[index] is not None
    }
    if not all(each.is_sparse for each in (grad, *state.values())):  # torch cannot add mixtures
        grad, state = _dense(grad), {key: _dense(value) for key, value in state.items()}
    pairs = param.is_complex() and not grad.is_sparse  # sparse only meets rules that are linear
    if pairs:
        param, grad = torch.view_as_real(param), torch.view_as_real(grad.resolve_conj())
        state = {key: torch.view_as_real(value) for key, value in state.items()}
    rounder = Rounder(batch, index) if has_rounder(param, batch.hyper) else None
    if rounder is not None:
        grad = _dense(grad)
    rule = _in_blocks if _can_be_cut(batch, param, grad) else _as_one
    for key, value in rule(batch, param, grad, state, step, rounder).items():
        column = batch.columns.setdefault(key, [None] * len(batch.params))
        if column[index] is None or column[index].is_sparse:
            value = torch.view_as_complex(value) if pairs else value
            column[index] = _laid_out(value, batch.params[index])
            batch.has_new_state = True
        elif value is not state[key]:
            state[key].copy_(value)


def _can_be_cut(batch: Batch, param: torch.Tensor, grad: torch.Tensor) -> bool:
    """Return whether a parameter is large, and its rule goes by elements."""
    large = param.numel() > block_length(param) and batch.algorithm.unit == "element"
    return large and type(param) in PLAIN and grad.layout is torch.strided


def _as_one(
    batch: Batch,
    param: torch.Tensor,
    grad: torch.Tensor,
    state: State,
    step: Any,
    rounder: Rounder | None,
) -> State:
    """Update a parameter; return its new state."""
    if batch.scale is not None:
        grad = times(widen(grad), batch.scale)
    if rounder is not None:
        return _rounded(batch, param, grad, state, step, rounder)
    change, new = batch.algorithm.update(param, grad, state, step, batch.hyper)
    param.add_(change)
    return new


def _rounded(
    batch: Batch,
    param: torch.Tensor,
    grad: torch.Tensor,
    state: State,
    step: Any,
    rounder: Rounder,
) -> State:
    """Update by the rule for float32, and round what comes of it."""
    entry = rounder.entry
    part = RoundedPart(rounder, param, None if entry is None else state[entry])
    weight = part.weight()
    hyper = {**batch.hyper, "state_dtype": None}  # so that state is rounded here alone
    old = {key: widen(state[key]) for key in batch.algorithm.buffers if key in state}
    change, values = batch.algorithm.update(weight, widen(grad), old, step, hyper)
    part.store(weight + change)
    new = dict(state)
    for key, value in values.items():
        if value is old.get(key):  # a buffer at rest
            continue
        if key not in new:
            new[key] = torch.empty_like(param, dtype=rounder.state_dtype, requires_grad=False)
        part.store_state(key, value, new[key])
    return new


def _in_blocks(
    batch: Batch,
    param: torch.Tensor,
    grad: torch.Tensor,
    state: State,
    step: Any,
    rounder: Rounder | None,
) -> State:
    """Update a large parameter block by block, its state in place; return its new state.

    The rule goes by elements, so that its terms need not be as large as the parameter.
    """
    new = {**state, **_initial_state(batch, param, grad, state, step)}
    tensors = [param, grad, *new.values()]
    for its_param, its_grad, *values in in_blocks(tensors, block_length(param)):
        its_state = dict(zip(new, values, strict=True))
        old = {key: value for key, value in its_state.items() if key in state}
        for key, value in _as_one(batch, its_param, its_grad, old, step, rounder).items():
            if value is not its_state[key]:
                its_state[key].copy_(value)
    return new


def _initial_state(
    batch: Batch, param: torch.Tensor, grad: torch.Tensor, state: State, step: Any
) -> State:
    """Return room for the state that begins now, which an update of no elements tells."""
    few = [tensor.new_empty(0) for tensor in (param, grad, *state.values())]
    old = dict(zip(state, few[2:], strict=True))
    _, new = batch.algorithm.update(few[0], few[1], old, step, batch.hyper)
    return {
        key: torch.empty_like(param, dtype=value.dtype, requires_grad=False)
        for key, value in new.items()
        if key not in state
    }


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor


def _laid_out(value: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Lay out new state in its parameter's order in memory, which the fast kernels need.

    It was made from a gradient, which may lie in another one.
    """
    if value.is_sparse or value.stride() == param.stride():
        return value
    return torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(value)
