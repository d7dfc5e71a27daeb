"""The gradient operations of a step, applied scope by scope."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import torch

from .._util.sharding import Shards
from .._util.tensors import is_dtensor
from ..algorithms.base import Batch
from ..model.parameters import ParamInfo
from .nonfinite import Known, is_any_bad, keep_norms, nonfinite_cause
from .norms import each_norm, finite
from .operations import ClipNorm, ClipParamNorm, Operation, ScopeGradients


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
) -> torch.Tensor | None:
    """Run a scope's operations over its batches, which then hold the changed gradients.

    With `every`, the gradients that come out are looked at, norm or not. With `shards`, it must be
    called on every process, also where there is no batch. `first` is what `first_norms` gave.
    `known` receives the norms of the single gradients as they came, if they were computed.

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
        first,
    )
    for operation, amount in steps:
        operation.run(work, amount)
    bad = bool(work.norms) and not finite(work.norms)
    # A norm has read all of them, but for what a function of the user's made of them since.
    if every and not bad and (not work.norms or work.made):
        bad = is_any_bad(batches, work.grads, shards)
    if bad:
        raise nonfinite_cause(batches, work.made, clock, shards)
    if work.first_norms is not None:
        keep_norms(known, batches, work.first_norms)
    taken = 0
    for batch in batches:
        count = len(batch.grads)
        batch.grads = work.grads[taken : taken + count]
        batch.scale = work.scale
        taken += count
    return work.norm
