"""Measure a step of any optimizer: norms, and what moved, without touching what is measured.

Norms of gradients and weights are over all elements. The update is measured on up to `_SAMPLE`
evenly spaced elements of each tensor, so that nothing is copied that has the size of the model; its
norm is then an estimate. The results stay on their device and are read many at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._util.sharding import local_part
from .._util.tensors import is_dtensor
from ..gradients.norms import each_norm, values_of

_SAMPLE = 1024


@dataclass(frozen=True)
class Measured:
    """What a step did to one parameter.

    `asked` counts the sampled elements with a gradient other than 0, `still` those of them that
    the step left as they were. `update` and `weight` are norms; `weight` is that before the step.
    """

    name: str
    group: int
    grad: float
    weight: float
    update: float
    asked: int
    still: int


@dataclass
class Entry:
    """A parameter to measure."""

    name: str
    group: int
    param: torch.Tensor


class StepMeasure:
    """The measurement of one step; made before it, completed after it.

    Args:
        entries: the parameters; those without a plain, dense gradient are left out.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = [entry for entry in entries if _is_plain(entry.param)]
        self._numbers: torch.Tensor | None = None
        if not self._entries:
            return
        with torch.no_grad():
            params = [entry.param.detach() for entry in self._entries]
            grads = [_grad_of(entry.param).detach() for entry in self._entries]
            self._norms = [_on_one_device(each_norm(grads)), _on_one_device(each_norm(params))]
            self._before = [_sample(param).clone() for param in params]
            self._grads = [_sample(grad).clone() for grad in grads]

    def complete(self) -> None:
        """Measure what the step did, after it."""
        if not self._entries:
            return
        with torch.no_grad():
            after = [_sample(entry.param.detach()) for entry in self._entries]
            changes = [
                new.float() - old.float() for new, old in zip(after, self._before, strict=True)
            ]
            updates = _on_one_device(torch._foreach_norm(changes))
            asked = _on_one_device([(grad != 0).sum() for grad in self._grads])
            still = _on_one_device(
                [
                    ((new == old) & (grad != 0)).sum()
                    for new, old, grad in zip(after, self._before, self._grads, strict=True)
                ]
            )
            self._numbers = torch.stack([*self._norms, updates, asked, still])
        self._before, self._grads = [], []

    def read(self) -> list[Measured]:
        """Return the numbers; this waits for the device."""
        if self._numbers is None:
            return []
        found = []
        for entry, (grad, weight, update, asked, still) in zip(
            self._entries, self._numbers.T.tolist(), strict=True
        ):
            count = entry.param.numel()
            scale = (count / len(range(0, count, _spacing(count)))) ** 0.5
            found.append(
                Measured(
                    entry.name, entry.group, grad, weight, update * scale, int(asked), int(still)
                )
            )
        return found


def is_zero(grad: torch.Tensor) -> bool:
    """Return whether all elements of a gradient are 0; this waits for the device.

    Of a sharded one only the local part is looked at: the other processes do not take part.
    """
    local = local_part(grad.detach())
    values = values_of(local) if local.is_sparse else local
    return not bool((values != 0).any())


def _grad_of(param: torch.Tensor) -> torch.Tensor:
    assert param.grad is not None  # `_is_plain` has looked
    return param.grad


def _is_plain(param: torch.Tensor) -> bool:
    """Return whether a parameter and its gradient are dense, real and laid out alike."""
    grad = param.grad
    if grad is None or is_dtensor(param) or is_dtensor(grad) or param.is_meta:
        return False
    if param.layout is not torch.strided or grad.layout is not torch.strided:
        return False
    return (
        param.is_floating_point()
        and grad.is_floating_point()
        and param.numel() > 0
        and param.shape == grad.shape
    )


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Return evenly spaced elements of a tensor, flat; the same places in every layout."""
    every = _spacing(tensor.numel())
    if tensor.is_contiguous() or every == 1:
        return tensor.reshape(-1)[::every]
    # The same places by their coordinates, since a copy of the whole would cost too much.
    places = torch.arange(0, tensor.numel(), every, device=tensor.device)
    return tensor[torch.unravel_index(places, tensor.shape)]


def _spacing(count: int) -> int:
    """Return the distance of the sampled elements: odd, so that not all are in one column."""
    return 1 if count <= _SAMPLE else -(-count // _SAMPLE) | 1


def _on_one_device(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return scalars as one vector of float32, on the device of the first."""
    device = numbers[0].device
    return torch.stack([number.to(device, torch.float32, non_blocking=True) for number in numbers])
