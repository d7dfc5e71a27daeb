"""What a rule may do to the gradients of its parameters, between backward and update."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import torch

from .._util.grammar import Expression
from .._util.numbers import check_amount, is_number, python_number
from .._util.sharding import Shards, wholes_of
from .._util.tensors import is_dtensor
from ..algorithms.base import Batch, times, widen
from ..errors import PlanError
from ..model.parameters import ParamInfo
from ..schedules import Schedule
from .nonfinite import DeferredChecks, Known, is_any_bad, keep_norms, nonfinite_cause
from .norms import clamped, each_norm, finite, total, values_of

Amount = float | Schedule
Grads = list[torch.Tensor]


@dataclass
class ScopeGradients:
    """The gradients of one scope on their way through its operations.

    `batches` hold them as they were given, and `described` knows the parameters by name. `scale` is
    a factor still to be multiplied onto every gradient; `norms` the scalar tensors that were
    computed anyway, which tell whether everything is finite; `made` what functions of the user's
    own returned, to name the one that returned something else. `shards` is there where the
    gradients are parts of those of all processes: of FSDP1, whose tensors do not tell. `first` are
    the norms that the first operation asks for, where they were measured for all scopes at once.
    """

    batches: Sequence[Batch]
    described: Mapping[str, ParamInfo]
    shards: Shards | None = None
    first: list[torch.Tensor] | None = None
    scale: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    norms: list[torch.Tensor] = field(default_factory=list)
    made: list[tuple[Operation, Grads]] = field(default_factory=list)
    #: the 2-norm of each gradient as it was given, if an operation has computed them
    first_norms: Sequence[torch.Tensor] | None = None
    #: a norm of each gradient from the first operation that has computed them, and the function of
    #: the user's own that ran before it: to name a parameter later
    each: Sequence[torch.Tensor] | None = None
    each_by: Operation | None = None

    def __post_init__(self) -> None:
        self.grads: Grads = [grad for batch in self.batches for grad in batch.grads]
        self._given = self.grads

    @property
    def params(self) -> list[torch.Tensor]:
        """The parameters, in the order of their gradients."""
        return [param for batch in self.batches for param in batch.params]

    @property
    def infos(self) -> list[ParamInfo]:
        """What is known of the parameters, in the order of their gradients."""
        return [self.described[name] for batch in self.batches for name in batch.names]

    @property
    def has_new_grads(self) -> bool:
        """Whether an operation has put other tensors in the place of the gradients."""
        return self.grads is not self._given

    def settle(self) -> Grads:
        """Return the gradients with the pending factor multiplied on, as new tensors."""
        if self.scale is not None:
            self.grads = [times(grad, self.scale) for grad in self.grads]
            self.scale = None
        return self.grads

    def each_norm(self, p: float) -> Sequence[torch.Tensor]:
        """Return the p-norm of each gradient; they are kept in `norms` too."""
        whole = self._norms(p)
        self.norms += whole  # also of what this process has no part of: all must judge alike
        return whole if self.shards is None else self.shards.of(self._names(), whole)

    def total_norm(self, p: float) -> torch.Tensor:
        """Return the p-norm of all gradients together, as if they were one vector."""
        return total(self._norms(p), p)

    def _norms(self, p: float) -> Sequence[torch.Tensor]:
        """Return the p-norms of all gradients of the scope, on every process."""
        if self.first is not None:
            own: Sequence[torch.Tensor] = self.first
            self.first = None
        else:
            own = each_norm(self.grads, p)
        if self.shards is not None:
            return self.shards.norms(self._names(), own, p)
        self.note_each(own)
        if p == 2 and self.grads is self._given:
            self.first_norms = own
        return own

    def note_each(self, norms: Sequence[torch.Tensor]) -> None:
        """Keep a norm of each gradient, of the first operation that computes them."""
        if self.each is None:
            self.each = norms
            self.each_by = self.made[-1][0] if self.made else None

    def _names(self) -> list[str]:
        return [info.name for info in self.infos]

    def multiply(self, factor: torch.Tensor) -> None:
        """Put one more factor on every gradient."""
        self.scale = factor if self.scale is None else self.scale * factor


class Operation(Expression, ABC):
    """One gradient operation of a scope; `amount` is its number, or a schedule of it.

    `measures` says whether it computes norms, which tell of a gradient that is not finite; `whole`
    whether it must see whole tensors, where a norm of parts does not do; `each` whether it treats
    each parameter by itself; `positive` whether the amount must be above 0.
    """

    measures: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    each: ClassVar[bool] = False
    positive: ClassVar[bool] = True
    amount: Amount

    @abstractmethod
    def run(self, work: ScopeGradients, amount: float) -> None:
        """Change the gradients of a scope; `amount` is the number at this step."""

    def __post_init__(self) -> None:
        """Raise `PlanError` unless the amount is a positive number or a value schedule."""
        amount = python_number(self.amount)
        object.__setattr__(self, "amount", amount)
        if isinstance(amount, Schedule):
            if amount.kind == "factor":
                raise PlanError(
                    f"{self.source_name}({amount!r}): the schedule is a factor; a threshold is a "
                    "value: give it a start."
                )
            return
        usable = is_number(amount) and 0 <= amount < math.inf
        if not usable or (self.positive and amount == 0):
            limit = "above 0" if self.positive else "of at least 0"
            raise PlanError(
                f"{self.source_name} was given {amount!r}; expected a finite number {limit}."
            )


_DOUBLE = (torch.float64, torch.complex128)


@dataclass(frozen=True, repr=False)
class _ByNorm(Operation):
    """An operation that measures p-norms."""

    measures: ClassVar[bool] = True
    amount: Amount
    p: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        p = python_number(self.p)
        object.__setattr__(self, "p", p)
        if not is_number(p) or not p > 0:
            raise PlanError(
                f"{self.source_name} was given p={p!r}; expected a number above 0, or float('inf') "
                "for the largest number."
            )


@dataclass(frozen=True, repr=False)
class ClipNorm(_ByNorm):
    """Bring the norm of all gradients of the scope together down to a threshold.

    Formula: `g * min(1, amount / (norm + 1e-6))`, with the p-norm over all numbers of the scope.

    Args:
        amount: the threshold: a number, or a schedule that is a value.
        p: the order of the norm, `float("inf")` for the largest number.

    Example:
        >>> clip_norm(1.0)
        clip_norm(1.0)

    References:
        Pascanu et al., On the difficulty of training recurrent neural networks (2013).
    """

    source_name: ClassVar[str] = "clip_norm"

    def run(self, work: ScopeGradients, amount: float) -> None:
        norm = work.total_norm(self.p)
        if work.scale is not None:
            norm = norm * work.scale.abs()
        if work.norm is None:
            work.norm = norm
        work.norms.append(norm)
        work.multiply(torch.clamp(amount / (norm + 1e-6), max=1.0))


@dataclass(frozen=True, repr=False)
class ClipValue(Operation):
    """Bring every single number of the gradients into [-amount, amount].

    Example:
        >>> clip_value(0.5)
        clip_value(0.5)
    """

    source_name: ClassVar[str] = "clip_value"
    amount: Amount

    def run(self, work: ScopeGradients, amount: float) -> None:
        work.grads = [_on_values(g, lambda x: clamped(x, amount)) for g in work.settle()]


@dataclass(frozen=True, repr=False)
class ClipParamNorm(_ByNorm):
    """Bring the norm of each parameter's gradient down to a threshold, one by one.

    Formula: `g * min(1, amount / (norm(g) + 1e-6))` for each parameter.

    Example:
        >>> clip_param_norm(0.1)
        clip_param_norm(0.1)
    """

    source_name: ClassVar[str] = "clip_param_norm"
    each: ClassVar[bool] = True

    def run(self, work: ScopeGradients, amount: float) -> None:
        work.settle()
        norms = work.each_norm(self.p)
        factors = [torch.clamp(amount / (norm + 1e-6), max=1.0) for norm in norms]
        work.grads = list(map(times, work.grads, factors))


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

    References:
        Brock et al., High-performance large-scale image recognition without normalization (2021),
        equation 3.
    """

    source_name: ClassVar[str] = "agc"
    measures: ClassVar[bool] = True
    whole: ClassVar[bool] = True
    amount: Amount = 0.01
    eps: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "eps", python_number(self.eps))
        check_amount("agc", "eps", self.eps)

    def run(self, work: ScopeGradients, amount: float) -> None:
        clipped, sums = [], []
        for grad, param in zip(work.settle(), work.params, strict=True):
            dense = grad.to_dense() if grad.is_sparse else grad
            norm, weight = _unit_norm(dense), _unit_norm(param).clamp(min=self.eps)
            factor = torch.where(norm > amount * weight, amount * weight / norm, 1.0)
            clipped.append(times(dense, factor))
            sums.append(norm.sum())
        wholes = wholes_of(sums)
        work.note_each(wholes)
        work.norms += wholes
        work.grads = clipped


@dataclass(frozen=True, repr=False)
class ScaleGradients(Operation):
    """Multiply the gradients by a number (or by a schedule that is a value).

    Example:
        >>> scale_gradients(0.1)
        scale_gradients(0.1)
    """

    source_name: ClassVar[str] = "scale_gradients"
    positive: ClassVar[bool] = False
    amount: Amount

    def run(self, work: ScopeGradients, amount: float) -> None:
        if not work.grads:  # they are on other processes, but the norm of all is scaled here too
            work.multiply(torch.tensor(amount, dtype=torch.float64))
            return
        wide = any(grad.dtype in _DOUBLE for grad in work.grads)
        dtype = torch.float64 if wide else torch.float32
        # Filled on the device: `torch.tensor` would copy the number there, which waits.
        work.multiply(torch.full((), amount, dtype=dtype, device=work.grads[0].device))


@dataclass(frozen=True, repr=False)
class Apply(Operation):
    """A function of one's own: `(grads, infos) -> grads`, lists of tensors and of `ParamInfo`."""

    source_name: ClassVar[str] = "apply"
    whole: ClassVar[bool] = True
    function: Callable[[Grads, Sequence[ParamInfo]], Sequence[torch.Tensor]]
    amount: Amount = 1.0

    def source_text(self, quote: bool) -> str:
        return f"apply({getattr(self.function, '__qualname__', repr(self.function))})"

    def run(self, work: ScopeGradients, amount: float) -> None:
        given = work.settle()
        infos = work.infos
        got = self._checked(self.function(list(given), infos), given, infos)
        work.made.append((self, got))
        work.grads = got

    def _checked(self, got: Any, given: Grads, infos: Sequence[ParamInfo]) -> Grads:
        """Return what the function returned, if it is a gradient for each one given."""
        if not isinstance(got, Iterable) or isinstance(got, (torch.Tensor, Mapping, str)):
            what = "nothing (None)" if got is None else f"a {type(got).__name__}"
            raise PlanError(
                f"{self!r} returned {what}; expected the list of all gradients, also of those that "
                "stay as they are or were changed in place."
            )
        grads = list(got)
        if len(grads) != len(given):
            raise PlanError(
                f"{self!r} was given {len(given)} gradients and returned {len(grads)}; expected "
                "one for each."
            )
        for old, new, info in zip(given, grads, infos, strict=True):
            wrong = _unlike(new, old)
            if wrong:
                raise PlanError(
                    f"{self!r} returned {wrong} for {info.name!r}; expected a tensor "
                    f"of shape {tuple(old.shape)} and of {_numbers(old)} numbers on {old.device}."
                )
        return grads


def _unlike(new: Any, old: torch.Tensor) -> str:
    """Return what keeps a value from standing in for a gradient, or ""."""
    if not isinstance(new, torch.Tensor):
        return type(new).__name__
    if new.shape != old.shape:
        return str(tuple(new.shape))
    if new.device != old.device:
        return f"a tensor on {new.device}"
    return "" if _numbers(new) == _numbers(old) else f"{_numbers(new)} numbers"


def _numbers(tensor: torch.Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "real" if tensor.is_floating_point() else "whole"


def _unit_norm(tensor: torch.Tensor) -> torch.Tensor:
    """Return norms by output unit, shaped to multiply the tensor."""
    dims = tuple(range(1, tensor.ndim)) or None
    rows = widen(tensor)
    norm: torch.Tensor = torch.linalg.vector_norm(rows, dim=dims, keepdim=tensor.ndim > 1)
    return norm


def _on_values(
    grad: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    if grad.is_sparse:
        values = _on_values(values_of(grad), function)
        places = grad.coalesce().indices()
        return torch.sparse_coo_tensor(  # said here, as torch warns of invariants left open
            places, values, grad.shape, check_invariants=False, is_coalesced=True
        )
    if grad.is_complex():  # the real and the imaginary part are two numbers
        parts = function(torch.view_as_real(grad.resolve_conj()))
        pairs: torch.Tensor = torch.view_as_complex(parts)
        return pairs
    return function(grad)


clip_norm = ClipNorm
clip_value = ClipValue
clip_param_norm = ClipParamNorm
agc = AGC
scale_gradients = ScaleGradients
#: constructors by the name under which plans call them
OPERATIONS: dict[str, Callable[..., Any]] = {
    operation.source_name: operation
    for operation in (AGC, ClipNorm, ClipParamNorm, ClipValue, ScaleGradients)
}


def first_norms(
    scopes: Mapping[int, Sequence[Batch]], steps: Sequence[Sequence[tuple[Operation, float]]]
) -> dict[int, list[torch.Tensor]]:
    """Return the norms with which scopes begin, where the gradients are sharded.

    They are measured for all scopes together: one collective a step instead of one for each scope.

    Args:
        scopes: the batches of each scope, by its number.
        steps: the operations of each scope, each with its number.
    """
    by_order: dict[float, list[int]] = {}
    for scope, batches in scopes.items():
        operation = steps[scope][0][0] if steps[scope] else None
        sharded = any(is_dtensor(grad) for batch in batches for grad in batch.grads)
        if sharded and isinstance(operation, (ClipNorm, ClipParamNorm)):
            by_order.setdefault(operation.p, []).append(scope)
    found: dict[int, list[torch.Tensor]] = {}
    for p, members in by_order.items():
        grads = {n: [grad for batch in scopes[n] for grad in batch.grads] for n in members}
        norms = iter(each_norm([grad for its in grads.values() for grad in its], p))
        found |= {scope: list(islice(norms, len(its))) for scope, its in grads.items()}
    return found


def operate(
    batches: Sequence[Batch],
    steps: Sequence[tuple[Operation, float]],
    infos: Mapping[str, ParamInfo],
    clock: int,
    every: bool = False,
    shards: Shards | None = None,
    first: list[torch.Tensor] | None = None,
    known: Known | None = None,
    deferred: DeferredChecks | None = None,
) -> torch.Tensor | None:
    """Run a scope's operations over its batches, which then hold the changed gradients.

    With `every`, the gradients that come out are looked at, norm or not. With `shards`, it must be
    called on every process, also where there is no batch. `first` is what `first_norms` gave.
    `known` receives the norms of the single gradients as they came, if they were computed. With
    `deferred`, which receives the norms that decide, nothing is read on the host or raised.

    Returns:
        The norm of the scope before its first `clip_norm`, or None.

    Raises:
        NonFiniteError: if a norm shows that a gradient is not finite; nothing was changed.
    """
    work = ScopeGradients(batches, infos, shards, first)
    for operation, amount in steps:
        operation.run(work, amount)
    # A norm has read all of them, but for what a function of the user's made of them since.
    look = every and (not work.norms or bool(work.made))
    if deferred is not None:
        _defer(deferred, work, batches, look)
    elif _is_bad(work, batches, look):
        raise nonfinite_cause(batches, work.made, clock, shards)
    if work.first_norms is not None:
        keep_norms(known, batches, work.first_norms)
    taken = 0
    for batch in batches:
        batch.scale = work.scale
        if work.has_new_grads:
            count = len(batch.grads)
            batch.grads = work.grads[taken : taken + count]
            taken += count
    return work.norm


def _is_bad(work: ScopeGradients, batches: Sequence[Batch], look: bool) -> bool:
    if work.norms and not finite(work.norms):
        return True
    return look and is_any_bad(batches, work.grads, work.shards)


def _defer(
    deferred: DeferredChecks, work: ScopeGradients, batches: Sequence[Batch], look: bool
) -> None:
    """Leave it to the device whether the gradients of a scope are finite."""
    if work.norms:
        names = [name for batch in batches for name in batch.names]
        deferred.add(work.norms, names, work.each or [], work.each_by)
    if look:
        deferred.look_at(batches, work.grads, work.made[-1][0] if work.made else None)
