"""Updates that the device alone decides on: where a gradient is not finite, nothing changes.

The flag `found_inf` of a batch is a number on the device that the host does not know yet.
Multiplying by 0 would not do, as NaN times 0 is NaN: what was there before is selected instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..algorithms.base import Batch
from .base import Kernel

#: elements of parameters that are updated together, so that the copies stay small
PORTION = 16_777_216


def run(kernel: Kernel, batches: Sequence[Batch]) -> None:
    """Let a kernel update batches whose steps were counted; both only where gradients are finite.

    Args:
        kernel: the kernel; it may know of `found_inf` itself, as torch's fused operators do.
        batches: all of them have a `found_inf`, or none has.
    """
    if batches[0].found_inf is None:
        kernel.run(batches)
        return
    update(kernel, batches)
    by_flag: dict[int, list[Batch]] = {}
    for batch in batches:
        by_flag.setdefault(id(batch.found_inf), []).append(batch)
    for its in by_flag.values():
        steps = [step for batch in its for step in batch.steps]
        torch._foreach_add_(steps, its[0].found_inf, alpha=-1)  # type: ignore[arg-type]


def update(kernel: Kernel, batches: Sequence[Batch]) -> None:
    """Let a kernel update batches as far as `found_inf` allows; steps stay as they are."""
    if kernel.masks or batches[0].found_inf is None:
        kernel.run(batches)
        return
    for batch in batches:
        for indices in _portions(batch.params):
            _update_or_keep(kernel, batch, indices)


def _update_or_keep(kernel: Kernel, batch: Batch, indices: list[int]) -> None:
    """Update some parameters of a batch; put the numbers from before back if `found_inf` is 1."""
    part = part_of(batch, indices)
    states = (value for column in part.columns.values() for value in column)
    live = [*part.params, *(value for value in states if value is not None)]
    before = [tensor.clone() for tensor in live]
    kernel.run([part])
    assert batch.found_inf is not None
    bad = batch.found_inf.bool()
    for tensor, old in zip(live, before, strict=True):
        torch.where(bad, old, tensor, out=tensor)
    if part.has_new_state:
        give_back(part, batch, indices)


def _portions(params: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Yield positions of parameters that have about `PORTION` elements together."""
    portion: list[int] = []
    filled = 0
    for index, param in enumerate(params):
        if portion and filled + param.numel() > PORTION:
            yield portion
            portion, filled = [], 0
        portion.append(index)
        filled += param.numel()
    if portion:
        yield portion


def part_of(batch: Batch, indices: Sequence[int]) -> Batch:
    """Return some parameters of a batch as a batch of their own."""
    return Batch(
        algorithm=batch.algorithm,
        params=[batch.params[i] for i in indices],
        grads=[batch.grads[i] for i in indices],
        columns={key: [values[i] for i in indices] for key, values in batch.columns.items()},
        steps=[batch.steps[i] for i in indices],
        hyper=batch.hyper,
        scale=batch.scale,
        names=[batch.names[i] for i in indices] if batch.names else [],
        followed=batch.followed,
    )


def give_back(part: Batch, batch: Batch, indices: Sequence[int]) -> None:
    """Put state that a part began into the columns of the whole."""
    for key, values in part.columns.items():
        whole = batch.columns.setdefault(key, [None] * len(batch.params))
        for index, value in zip(indices, values, strict=True):
            whole[index] = value
    part.has_new_state, batch.has_new_state = False, True
