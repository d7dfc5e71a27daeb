"""Gradients that are not finite: which are looked at, and which of them is named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._util.sharding import Shards
from ..algorithms.base import Batch
from ..errors import NonFiniteError
from .norms import bad_counts, each_norm, every_finite, finite, found_inf, largest, values_of

Grads = list[torch.Tensor]
#: the 2-norms of single gradients that were computed anyway, by group
Known = dict[str, Sequence[torch.Tensor]]
#: what functions of the user's own returned, each with the operation that called it
Made = Sequence[tuple[object, Grads]]
_ADVICE = (
    "Look at the loss of this batch; lower the lr or lengthen the warmup; under float16 use "
    "torch.amp.GradScaler; or skip such steps with Plan(nonfinite='skip')."
)


def check_finite(
    batches: Sequence[Batch],
    clock: int,
    shards: Shards | None = None,
    known: Known | None = None,
) -> None:
    """Raise `NonFiniteError` for the first gradient that is not finite.

    With `shards`, it must be called on every process, also where there is no batch. `known`
    receives the norms that were computed, by group.
    """
    if shards is None:
        grads = [grad for batch in batches for grad in batch.grads]
        norms = each_norm(grads)
        keep_norms(known, batches, norms)
        if not norms or finite(norms) or not any(bad_counts(grads)):
            return
    names, grads = _named(batches)
    name = _first_bad(names, grads, shards)
    if name is not None:
        raise nonfinite_error(name, clock)


def keep_norms(
    known: Known | None, batches: Sequence[Batch], norms: Sequence[torch.Tensor]
) -> None:
    """Keep the norms of all gradients of these batches, by group, if somebody asks for them."""
    if known is None:
        return
    taken = 0
    for batch in batches:
        known[batch.hyper["name"]] = norms[taken : taken + len(batch.params)]
        taken += len(batch.params)


def _named(batches: Sequence[Batch]) -> tuple[list[str], list[torch.Tensor]]:
    """Return the names of all parameters, and their gradients as they were given."""
    names = [name for batch in batches for name in batch.names]
    return names, [grad for batch in batches for grad in batch.grads]


def is_any_bad(batches: Sequence[Batch], grads: Grads, shards: Shards | None) -> bool:
    """Return whether a gradient is not finite, on any process that has parts of them."""
    if shards is not None:
        return _first_bad(*_named(batches), shards) is not None
    return not every_finite(grads)


def nonfinite_cause(
    batches: Sequence[Batch], made: Made, clock: int, shards: Shards | None
) -> NonFiniteError:
    """Return the error for norms that are not finite; names what was the first not to be.

    Where each process has parts of the gradients, all find the same. No function of the user's ran
    then, as those see whole tensors only.
    """
    names, grads = _named(batches)
    bad = _first_bad(names, grads, shards)
    if bad is not None:
        given_back = [
            operation for operation, its in made if its[names.index(bad)] is grads[names.index(bad)]
        ]
        after = f" that {given_back[0]!r} returned" if given_back else ""  # it may have changed it
        return nonfinite_error(bad, clock, after)
    for operation, its in made:
        bad = _first_bad(names, its)
        if bad is not None:
            return NonFiniteError(
                f"{operation!r} returned NaN or infinite numbers for {bad!r} at step {clock}, "
                "whose gradient was finite; the weights were not changed. Fix the function."
            )
    last = made[-1][1] if made else grads
    norms = each_norm([grad.to(torch.promote_types(grad.dtype, torch.float64)) for grad in last])
    if shards is not None:
        names, norms = shards.names, shards.norms(names, norms, 2.0)
    numbers = [float(norm) for norm in norms]
    largest = names[numbers.index(max(numbers))]
    return NonFiniteError(
        f"every gradient is finite at step {clock}, but their norm overflows, most of all that of "
        f"{largest!r}; the weights were not changed. {_ADVICE}"
    )


def _first_bad(
    names: Sequence[str], grads: Sequence[torch.Tensor], shards: Shards | None = None
) -> str | None:
    """Return the first parameter whose gradient is not finite, on some process; or None."""
    if shards is None:
        pairs = zip(names, bad_counts(grads), strict=True)
        return next((name for name, count in pairs if count), None)
    bad = [(~torch.isfinite(values_of(grad))).sum() for grad in grads]
    counts = torch.stack(shards.norms(names, bad, 1.0)).tolist()
    return next((name for name, count in zip(shards.names, counts, strict=True) if count), None)


def nonfinite_error(name: str, step: int, returned: str = "") -> NonFiniteError:
    """Return the error for a gradient that must not reach the weights."""
    return NonFiniteError(
        f"the gradient of {name!r}{returned} is NaN or infinite at step {step}; the weights were "
        f"not changed. {_ADVICE}"
    )


# ------------------------------------------------------------------------ without waiting for it


@dataclass(frozen=True)
class _Check:
    """Norms that tell of a gradient that is not finite.

    `flags` decide; `each` is a norm of every parameter's gradient, to name one, and `by` what had
    returned these gradients, if not backward.
    """

    flags: Sequence[torch.Tensor]
    names: Sequence[str]
    each: Sequence[torch.Tensor]
    by: object = None


class DeferredChecks:
    """What decides, on the device, whether all gradients of a step are finite.

    The host reads nothing before the step is over. The norms of single gradients are kept until
    then (a number each), so that the error can still name a parameter.
    """

    def __init__(self) -> None:
        self._checks: list[_Check] = []

    def __bool__(self) -> bool:
        """Return whether anything was measured."""
        return bool(self._checks)

    def add(
        self,
        flags: Sequence[torch.Tensor],
        names: Sequence[str],
        each: Sequence[torch.Tensor],
        by: object = None,
    ) -> None:
        """Take norms: `flags` decide, and `each` belongs to the parameters of these names."""
        self._checks.append(_Check(flags, names, each, by))

    def look_at(self, batches: Sequence[Batch], grads: Grads, by: object = None) -> None:
        """Look at every number of these gradients of the batches."""
        if grads:
            found = largest(grads)
            self.add(found, [name for batch in batches for name in batch.names], found, by)

    def found_inf(self, device: torch.device) -> torch.Tensor:
        """Return 1.0 as a scalar on the device if a gradient is not finite, else 0.0."""
        return found_inf([flag for check in self._checks for flag in check.flags], device)

    def error(self, step: int) -> NonFiniteError:
        """Return the error for a step that the device has not taken; reads the norms."""
        for check in self._checks:
            if not finite(check.flags):
                return _late_error(check, step)
        raise AssertionError("all flags of the step are finite")


def _late_error(check: _Check, step: int) -> NonFiniteError:
    numbers = [float(norm) for norm in check.each]
    pairs = list(zip(check.names, numbers, strict=True))
    bad = next((name for name, number in pairs if not math.isfinite(number)), None)
    if bad is None:
        bad = max(pairs, key=lambda pair: pair[1])[0]
        what = f"the norm of the gradients overflows, most of all that of {bad!r},"
    else:
        after = "" if check.by is None else f" that {check.by!r} returned"
        what = f"the gradient of {bad!r}{after} is NaN or infinite, or its norm overflows,"
    return NonFiniteError(
        f"{what} at step {step}; the weights were not changed. On an accelerator this is known "
        f"when that step is over. {_ADVICE}"
    )
