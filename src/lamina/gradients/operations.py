"""What a rule may do to the gradients of its parameters, between backward and update."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import PlanError
from ..expressions import Spelled
from ..parameters import ParamInfo
from ..schedules import Schedule
from .norms import each_norm, gathered, total_norm, values_of

Amount = float | Schedule
Grads = list[torch.Tensor]


@dataclass
class Work:
    """The gradients of one scope on their way through its operations.

    `scale` is a factor still to be multiplied onto every gradient; `norms` the scalar tensors
    that were computed anyway, which tell whether everything is finite.
    """

    grads: Grads
    params: Sequence[torch.Tensor]
    infos: Sequence[ParamInfo]
    scale: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    norms: list[torch.Tensor] | None = None

    def settle(self) -> Grads:
        """The gradients with the pending factor multiplied on, as new tensors."""
        if self.scale is not None:
            self.grads = [grad * self.scale.to(grad.device, grad.dtype) for grad in self.grads]
            self.scale = None
        return self.grads

    def multiply(self, factor: torch.Tensor) -> None:
        """Put one more factor on every gradient."""
        self.scale = factor if self.scale is None else self.scale * factor


class Operation(Spelled, ABC):
    """One gradient operation of a scope; `amount` is its number, or a schedule of it."""

    amount: Amount

    @abstractmethod
    def run(self, work: Work, amount: float) -> None:
        """Change the gradients of a scope; `amount` is the number at this step."""

    def check(self, low_open: bool = True) -> None:
        """Raise `PlanError` unless the amount is a positive number or a value schedule."""
        amount = self.amount
        if isinstance(amount, Schedule):
            if amount.kind == "factor":
                raise PlanError(
                    f"{self.spelling}({amount!r}): the schedule is a factor; a threshold is a "
                    "value: give it a start."
                )
            return
        ok = isinstance(amount, (int, float)) and not isinstance(amount, bool)
        if not ok or not 0 <= amount < math.inf or (low_open and amount == 0):
            limit = "above 0" if low_open else "of at least 0"
            raise PlanError(
                f"{self.spelling} was given {amount!r}; expected a finite number {limit}."
            )


@dataclass(frozen=True, repr=False)
class ClipNorm(Operation):
    """Bring the norm of all gradients of the scope together down to a threshold.

    Formula: `g * min(1, amount / (norm + 1e-6))`, with the p-norm over all numbers of the scope.

    Args:
        amount: the threshold: a number, or a schedule that is a value.
        p: the order of the norm, `float("inf")` for the largest number.

    Example:
        >>> clip_norm(1.0)
        clip_norm(1.0)

    Source: Pascanu et al., On the difficulty of training recurrent neural networks (2013).
    """

    spelling: ClassVar[str] = "clip_norm"
    amount: Amount
    p: float = 2.0

    def __post_init__(self) -> None:
        self.check()
        if not self.p > 0:
            raise PlanError(f"clip_norm was given p={self.p!r}; expected a number above 0.")

    def run(self, work: Work, amount: float) -> None:
        norm = total_norm(work.grads, self.p)
        if work.scale is not None:
            norm = norm * work.scale.abs()
        if work.norm is None:
            work.norm = norm
        work.norms = [*(work.norms or []), norm]
        work.multiply(torch.clamp(amount / (norm + 1e-6), max=1.0))


@dataclass(frozen=True, repr=False)
class ClipValue(Operation):
    """Bring every single number of the gradients into [-amount, amount].

    Example:
        >>> clip_value(0.5)
        clip_value(0.5)
    """

    spelling: ClassVar[str] = "clip_value"
    amount: Amount

    def __post_init__(self) -> None:
        self.check()

    def run(self, work: Work, amount: float) -> None:
        work.grads = [_on_values(g, lambda x: x.clamp(-amount, amount)) for g in work.settle()]


@dataclass(frozen=True, repr=False)
class ClipParamNorm(Operation):
    """Bring the norm of each parameter's gradient down to a threshold, one by one.

    Formula: `g * min(1, amount / (norm(g) + 1e-6))` for each parameter.

    Example:
        >>> clip_param_norm(0.1)
        clip_param_norm(0.1)
    """

    spelling: ClassVar[str] = "clip_param_norm"
    amount: Amount
    p: float = 2.0

    def __post_init__(self) -> None:
        self.check()
        if not self.p > 0:
            raise PlanError(f"clip_param_norm was given p={self.p!r}; expected a number above 0.")

    def run(self, work: Work, amount: float) -> None:
        norms = each_norm(work.settle(), self.p)
        work.norms = [*(work.norms or []), *norms]
        factors = [torch.clamp(amount / (norm + 1e-6), max=1.0) for norm in norms]
        work.grads = [
            grad * factor.to(grad.device, grad.dtype)
            for grad, factor in zip(work.grads, factors, strict=True)
        ]


@dataclass(frozen=True, repr=False)
class AGC(Operation):
    """Adaptive gradient clipping: bound each unit's gradient by a share of its weights.

    Formula: `g_i * min(1, amount * max(norm(w_i), eps) / norm(g_i))` for each row i (output unit)
    of a matrix or convolution; vectors and scalars are one unit.

    Args:
        amount: the largest ratio of the norms of gradient and weight.
        eps: the least norm of a weight that is reckoned with, so that zeros can grow.

    Example:
        >>> agc(0.01)
        agc(0.01)

    Source: Brock et al., High-performance large-scale image recognition without normalization
    (2021), equation 3.
    """

    spelling: ClassVar[str] = "agc"
    amount: Amount = 0.01
    eps: float = 1e-3

    def __post_init__(self) -> None:
        self.check()

    def run(self, work: Work, amount: float) -> None:
        clipped = []
        for grad, param in zip(work.settle(), work.params, strict=True):
            dense = grad.to_dense() if grad.is_sparse else grad
            norm, weight = _unit_norm(dense), _unit_norm(param).clamp(min=self.eps)
            factor = torch.where(norm > amount * weight, amount * weight / norm, 1.0)
            clipped.append(dense * factor)
            work.norms = [*(work.norms or []), gathered(norm.sum())]
        work.grads = clipped


@dataclass(frozen=True, repr=False)
class Scale(Operation):
    """Multiply the gradients by a number (or by a schedule that is a value).

    Example:
        >>> scale(0.1)
        scale(0.1)
    """

    spelling: ClassVar[str] = "scale"
    amount: Amount

    def __post_init__(self) -> None:
        self.check(low_open=False)

    def run(self, work: Work, amount: float) -> None:
        first = work.grads[0]
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        work.multiply(torch.tensor(amount, dtype=dtype, device=first.device))


@dataclass(frozen=True, repr=False)
class Apply(Operation):
    """A function of one's own: `(grads, infos) -> grads`, lists of tensors and of `ParamInfo`."""

    spelling: ClassVar[str] = "apply"
    function: Callable[[Grads, Sequence[ParamInfo]], Sequence[torch.Tensor]]
    amount: Amount = 1.0

    def spelled(self, quote: bool) -> str:
        return f"apply({getattr(self.function, '__qualname__', repr(self.function))})"

    def run(self, work: Work, amount: float) -> None:
        given = work.settle()
        got = list(self.function(list(given), work.infos))
        if len(got) != len(given):
            raise PlanError(
                f"{self!r} was given {len(given)} gradients and returned {len(got)}; expected one "
                "for each."
            )
        for old, new, info in zip(given, got, work.infos, strict=True):
            if not isinstance(new, torch.Tensor) or new.shape != old.shape:
                shown = tuple(new.shape) if isinstance(new, torch.Tensor) else type(new).__name__
                raise PlanError(
                    f"{self!r} returned {shown} for {info.name!r}; expected a tensor of shape "
                    f"{tuple(old.shape)}."
                )
        work.grads = got


def _unit_norm(tensor: torch.Tensor) -> torch.Tensor:
    """Norms by output unit, shaped to multiply the tensor."""
    dims = tuple(range(1, tensor.ndim)) or None
    norm: torch.Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=tensor.ndim > 1)
    return norm


def _on_values(
    grad: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    if grad.is_sparse:
        values = function(values_of(grad))
        return torch.sparse_coo_tensor(grad.coalesce().indices(), values, grad.shape)
    if grad.is_complex():  # the real and the imaginary part are two numbers
        pairs: torch.Tensor = torch.view_as_complex(function(torch.view_as_real(grad)))
        return pairs
    return function(grad)


clip_norm = ClipNorm
clip_value = ClipValue
clip_param_norm = ClipParamNorm
agc = AGC
scale = Scale
#: constructors by the name under which plans call them
OPERATIONS: dict[str, Callable[..., Any]] = {
    "agc": agc,
    "clip_norm": clip_norm,
    "clip_param_norm": clip_param_norm,
    "clip_value": clip_value,
    "scale": scale,
}
