"""Clipping by hand, with torch's signatures: for tensors, modules, parameter groups, patterns."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import nn

from .._util.sharding import is_flattened, local_part
from .._util.tensors import is_dtensor
from ..algorithms.base import HALF
from ..errors import LaminaWarning, NonFiniteError, PlanError
from ..model.patterns import PatternLike
from .clip_targets import Limits, Parameters, Part, number_of, parts_of
from .norms import all_finite, clamped, each_norm, total_norm


@overload
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor: ...
@overload
def clip_grad_norm_(
    parameters: nn.Module,
    max_norm: Limits,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> dict[PatternLike, torch.Tensor]: ...
@torch.no_grad()
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float | Limits,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor | dict[PatternLike, torch.Tensor]:
    """Bring the norm of all gradients together down to a limit, in place.

    Formula: `g * min(1, max_norm / (norm + 1e-6))`, as in `torch.nn.utils.clip_grad_norm_`.

    Norms of 16-bit gradients are computed in float32. Other than in torch, a norm that is not
    finite changes nothing: the gradients stay as they are and a warning names the first bad one
    (torch turns all of them into NaN and 0). A tensor given twice counts once. Reads the norms on
    the host, which waits for an accelerator once.

    Args:
        parameters: a tensor, a list of tensors or of `(name, tensor)` pairs, a parameter group, or
            a module. Of a module, only parameters with `requires_grad` count, so that left-over
            gradients of frozen ones cannot shrink the others'.
        max_norm: the limit, at least 0; for a module also `{pattern: limit}`. Then each pattern has
            its own norm, a later pattern takes parameters from an earlier one, and what no
            pattern selects is not clipped.
        norm_type: the order of the norm, `float("inf")` for the largest number.
        error_if_nonfinite: raise instead of warning.
        foreach: as in torch; the result does not depend on it.

    Returns:
        The norm before clipping; for `{pattern: limit}` a dict of norms by pattern.

    Raises:
        HyperparameterError: for a negative limit or an order that is not above 0.
        NonFiniteError: with `error_if_nonfinite`, naming the parameter; nothing was changed.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> layer.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> clip_grad_norm_(layer, 1.0)
        tensor(5.)
    """
    p = number_of(norm_type, "norm_type", positive=True)
    parts = parts_of(parameters, max_norm, "max_norm")
    _refuse_flattened(parts)
    norms = [total_norm(part.grads, p) if part.grads else torch.tensor(0.0) for part in parts]
    values = _on_host(norms)
    for part, value in zip(parts, values, strict=True):
        if not math.isfinite(value):
            _not_finite(part, error_if_nonfinite)
    for part, norm, value in zip(parts, norms, values, strict=True):
        if math.isfinite(value) and value + 1e-6 > part.limit:
            _multiply(part.grads, torch.clamp(part.limit / (norm + 1e-6), max=1.0))
    if isinstance(max_norm, Mapping):
        return {part.key: norm for part, norm in zip(parts, norms, strict=True)}
    return norms[0]


@torch.no_grad()
def clip_grad_value_(
    parameters: Parameters, clip_value: float | Limits, foreach: bool | None = None
) -> None:
    """Bring every single number of the gradients into [-clip_value, clip_value], in place.

    As `torch.nn.utils.clip_grad_value_`; of a complex number, both parts.

    Args:
        parameters: as for `clip_grad_norm_`.
        clip_value: the limit, at least 0; for a module also `{pattern: limit}`.
        foreach: as in torch; the result does not depend on it.

    Raises:
        HyperparameterError: for a negative limit.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> layer.weight.grad = torch.tensor([[3.0, -4.0]])
        >>> clip_grad_value_(layer, 3.5)
        >>> layer.weight.grad
        tensor([[ 3.0000, -3.5000]])
    """
    for part in parts_of(parameters, clip_value, "clip_value"):
        for (_, tensor), grad in zip(part.named, part.grads, strict=True):
            if grad.is_sparse:  # the same place may be there twice: add up before clipping
                tensor.grad = grad = grad.coalesce()
            numbers = _local(grad)
            numbers = torch.view_as_real(numbers) if numbers.is_complex() else numbers
            clamped(numbers, part.limit, out=numbers)


def _refuse_flattened(parts: list[Part]) -> None:
    """Raise `PlanError` for parts of FSDP1, whose norm would be that of one process."""
    for part in parts:
        for name, tensor in part.named:
            if is_flattened(tensor):
                raise PlanError(
                    f"clip_grad_norm_: of {name}, FSDP1 (FullyShardedDataParallel) gives each "
                    "process a part, and the norm must be that of all. Call the wrapper's own "
                    "model.clip_grad_norm_(max_norm), or let a plan clip (clip_norm=)."
                )


def _multiply(grads: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply in place; 16-bit floats as float32, as the factor may be too small for them."""
    alike: dict[tuple[torch.device, bool], list[torch.Tensor]] = {}
    for grad in map(_local, grads):
        alike.setdefault((grad.device, grad.dtype in HALF), []).append(grad)
    for (device, half), together in alike.items():
        if half:
            wide = [grad.float() for grad in together]
            torch._foreach_mul_(wide, factor.to(device))
            torch._foreach_copy_(together, wide)
        else:
            torch._foreach_mul_(together, factor.to(device))


def _local(grad: torch.Tensor) -> torch.Tensor:
    """Return the numbers to change in place: of a shard, those of this process.

    A conjugate or negative that torch has not computed yet comes as what it is a view of: clipping
    that one clips both.
    """
    if grad.is_sparse:
        return grad._values()
    local = local_part(grad)
    local = local.conj() if local.is_conj() else local
    return torch._neg_view(local) if local.is_neg() else local


def _on_host(norms: Sequence[torch.Tensor]) -> list[float]:
    """Return all norms as numbers, with one wait for each device."""
    by_device: dict[torch.device, list[int]] = {}
    for index, norm in enumerate(norms):
        by_device.setdefault(norm.device, []).append(index)
    numbers = [0.0] * len(norms)
    for indices in by_device.values():
        together = torch.stack([norms[i].double() for i in indices]).tolist()
        for index, number in zip(indices, together, strict=True):
            numbers[index] = number
    return numbers


def _not_finite(part: Part, fail: bool) -> None:
    names = [name for name, _ in part.named]
    pairs = zip(names, part.grads, strict=True)
    bad = next((name for name, grad in pairs if not all_finite(_local(grad))), None)
    if bad is not None:
        what = f"the gradient of {bad} is NaN or infinite"
    elif any(map(is_dtensor, part.grads)):
        what = "a gradient on another process is NaN or infinite, or the norm overflows"
    else:
        norms = _on_host(each_norm(part.grads, math.inf))
        largest = names[norms.index(max(norms))]
        what = f"the norm of the gradients overflows, the largest is that of {largest}"
    if fail:
        raise NonFiniteError(f"clip_grad_norm_: {what}; no gradient was changed. Skip this step.")
    warnings.warn(
        f"clip_grad_norm_: {what}; these gradients were left as they are. Skip this step, or pass "
        "error_if_nonfinite=True.",
        LaminaWarning,
        stacklevel=4,
    )
