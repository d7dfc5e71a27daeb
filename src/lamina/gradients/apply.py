"""Running the gradient operations of each scope, and meeting gradients that are not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .._util.sharding import Shards
from ..algorithms.base import Batch
from ..errors import NonFiniteError
from ..model.parameters import ParamInfo
from .norms import all_finite, each_norm, every_finite, finite, values_of
from .operations import Operation, ScopeGradients

#: the operations of a scope with their numbers at this step
Steps = Sequence[tuple[Operation, float]]
_ADVICE = (
    "Look at the loss of this batch; lower the lr or lengthen the warmup; under float16 use "
    "torch.amp.GradScaler; or skip such steps with Plan(nonfinite='skip')."
)


def operate(
    batches: Sequence[Batch],
    steps: Steps,
    infos: Mapping[str, ParamInfo],
    clock: int,
    every: bool = False,
    shards: Shards | None = None,
) -> torch.Tensor | None:
    """Run a scope's operations over its batches, which then hold the changed gradients.

    With `every`, the gradients that come out are looked at, norm or not. With `shards`, it must be
    called on every process, also where there is no batch.

    Returns:
        The norm of the scope before its first `clip_norm`, or None.

    Raises:
        NonFiniteError: if a norm shows that a gradient is not finite; nothing was changed.
    """
    work = ScopeGradients(
        [grad for batch in batches for grad in batch.grads],
        [param for batch in batches for param in batch.params],
        [infos[name] for batch in batches for name in batch.names],
        shards,
    )
    for operation, amount in steps:
        operation.run(work, amount)
    bad = bool(work.norms) and not finite(work.norms)
    # A norm has read all of them, but for what a function of the user's made of them since.
    if every and not bad and (not work.norms or work.made):
        bad = _is_any_bad(batches, work)
    if bad:
        raise _cause(batches, work, clock)
    taken = 0
    for batch in batches:
        count = len(batch.grads)
        batch.grads = work.grads[taken : taken + count]
        batch.scale = work.scale
        taken += count
    return work.norm


def check_finite(batches: Sequence[Batch], clock: int, shards: Shards | None = None) -> None:
    """Raise `NonFiniteError` for the first gradient that is not finite.

    With `shards`, it must be called on every process, also where there is no batch.
    """
    if shards is not None:
        name = _bad_anywhere(batches, shards)
        if name is not None:
            raise nonfinite_error(name, clock)
        return
    if every_finite([grad for batch in batches for grad in batch.grads]):
        return
    for batch in batches:
        for name, grad in zip(batch.names, batch.grads, strict=True):
            if not all_finite(grad):
                raise nonfinite_error(name, clock)


def _is_any_bad(batches: Sequence[Batch], work: ScopeGradients) -> bool:
    """Return whether a gradient is not finite, on any process that has parts of them."""
    if work.shards is not None:
        return _bad_anywhere(batches, work.shards) is not None
    return not every_finite(work.grads)


def _cause(batches: Sequence[Batch], work: ScopeGradients, clock: int) -> NonFiniteError:
    """Return the error for norms that are not finite; names what was the first not to be."""
    if work.shards is not None:
        return _cause_anywhere(batches, work.shards, clock)
    names = [name for batch in batches for name in batch.names]
    grads = [grad for batch in batches for grad in batch.grads]
    bad = _first_bad(grads)
    if bad is not None:
        given_back = [made for made, its in work.made if its[bad] is grads[bad]]
        after = f" that {given_back[0]!r} returned" if given_back else ""  # it may have changed it
        return nonfinite_error(names[bad], clock, after)
    for made, its in work.made:
        bad = _first_bad(its)
        if bad is not None:
            return NonFiniteError(
                f"{made!r} returned NaN or infinite numbers for {names[bad]!r} at step {clock}, "
                "whose gradient was finite; the weights were not changed. Fix the function."
            )
    norms = [float(norm) for norm in _wide_norms(work.made[-1][1] if work.made else grads)]
    return _overflow(names[norms.index(max(norms))], clock)


def _cause_anywhere(batches: Sequence[Batch], shards: Shards, clock: int) -> NonFiniteError:
    """Find the cause where each process has parts of the gradients; all find the same."""
    name = _bad_anywhere(batches, shards)
    if name is not None:
        return nonfinite_error(name, clock)
    names = [name for batch in batches for name in batch.names]
    parts = _wide_norms([grad for batch in batches for grad in batch.grads])
    norms = [float(norm) for norm in shards.norms(names, parts, 2.0)]
    return _overflow(shards.names[norms.index(max(norms))], clock)


def _bad_anywhere(batches: Sequence[Batch], shards: Shards) -> str | None:
    """Return the first parameter whose gradient is not finite on some process, or None."""
    names = [name for batch in batches for name in batch.names]
    grads = [grad for batch in batches for grad in batch.grads]
    bad = [(~torch.isfinite(values_of(grad))).sum() for grad in grads]
    counts = torch.stack(shards.norms(names, bad, 1.0)).tolist()
    return next((name for name, count in zip(shards.names, counts, strict=True) if count), None)


def _wide_norms(grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    wide = [grad.to(torch.promote_types(grad.dtype, torch.float64)) for grad in grads]
    return each_norm(wide)


def _overflow(largest: str, clock: int) -> NonFiniteError:
    return NonFiniteError(
        f"every gradient is finite at step {clock}, but their norm overflows, most of all that of "
        f"{largest!r}; the weights were not changed. {_ADVICE}"
    )


def _first_bad(grads: Sequence[torch.Tensor]) -> int | None:
    return next((index for index, grad in enumerate(grads) if not all_finite(grad)), None)


def nonfinite_error(name: str, step: int, returned: str = "") -> NonFiniteError:
    """Return the error for a gradient that must not reach the weights."""
    return NonFiniteError(
        f"the gradient of {name!r}{returned} is NaN or infinite at step {step}; the weights were "
        f"not changed. {_ADVICE}"
    )
