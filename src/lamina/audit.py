"""Proof that what is frozen does not move: checksums of frozen tensors, compared at every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .errors import FrozenMovedError
from .holding import Held

#: integers of at most 32 bits: in the sum below, each then keeps at least 32 bits of its weight
_WORDS = {1: torch.int8, 2: torch.int16}
_CHUNK = 1 << 18
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # as a signed 64-bit number

Groups = Sequence[Mapping[str, Any]]


class Audit:
    """Checksums of every frozen parameter, and of the buffers of modules held in eval mode.

    Costs one reading of all of them before and after each step, and waits for an accelerator.
    Does nothing unless `on`.
    """

    def __init__(self, model: nn.Module, on: bool) -> None:
        self._on = on
        self._modules = list(model.named_modules()) if on else []
        self._known: dict[str, tuple[int, int]] = {}  # name: identity of the tensor, checksum

    def begin(self, groups: Groups, active: Sequence[bool | None]) -> None:
        """Take the checksums of what is frozen from now on; what was known stays known."""
        tensors = self._frozen(groups, active)
        self._known = {name: pair for name, pair in self._known.items() if name in tensors}
        new = {name: tensor for name, tensor in tensors.items() if name not in self._known}
        self._known |= _marks(new)

    def forget(self) -> None:
        """Drop all checksums, because weights were loaded on purpose."""
        self._known = {}

    def check(
        self, groups: Groups, active: Sequence[bool | None], step: int, following: int
    ) -> None:
        """Compare what is frozen with its checksums, before `step` or on the way to `following`.

        A tensor that was exchanged for another object (sharding does that) is taken as it is.

        Raises:
            FrozenMovedError: with the names of what moved.
        """
        tensors = self._frozen(groups, active)
        now = _marks({name: tensors[name] for name in self._known if name in tensors})
        moved = [
            name
            for name, (identity, total) in now.items()
            if identity == self._known[name][0] and total != self._known[name][1]
        ]
        if moved:
            when = f"{'during' if following > step else 'before'} step {step}"
            more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
            raise FrozenMovedError(
                f"{', '.join(map(repr, moved[:3]))}{more} should be frozen, but moved {when}. Look "
                "for another optimizer, an averaging of weights or an assignment that writes it. "
                "If weights were loaded on purpose, do that before Plan.build."
            )
        self._known |= now

    def _frozen(self, groups: Groups, active: Sequence[bool | None]) -> dict[str, torch.Tensor]:
        frozen: dict[str, torch.Tensor] = {}
        if not self._on:
            return frozen
        for group, trains in zip(groups, active, strict=True):
            if not trains:
                frozen.update(zip(group["param_names"], group["params"], strict=True))
        for path, module in self._modules:
            if isinstance(module.__dict__.get("train"), Held):
                frozen.update(module.named_buffers(prefix=path))
        return frozen


def _marks(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    totals = checksums(tensors.values())
    pairs = zip(tensors.items(), totals, strict=True)
    return {name: (id(tensor), total) for (name, tensor), total in pairs}


def checksums(tensors: Iterable[torch.Tensor]) -> list[int]:
    """A number for each tensor that changes with any single element, and with their order.

    Formula: `sum_i word_i * w_i mod 2^64` over chunks, with odd weights `w_i` that differ, so that
    no change of one word can vanish; the sums of chunks are chained by an odd factor.
    """
    sums = [_checksum(tensor) for tensor in tensors]
    totals = [0] * len(sums)
    by_device: dict[torch.device, list[int]] = {}
    for index, total in enumerate(sums):
        by_device.setdefault(total.device, []).append(index)
    for indices in by_device.values():  # one wait for each device
        for index, value in zip(
            indices, torch.stack([sums[i] for i in indices]).tolist(), strict=True
        ):
            totals[index] = value
    return totals


@torch.no_grad()
def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    local = local.coalesce().values() if local.is_sparse else local
    local = torch.view_as_real(local) if local.is_complex() else local
    words = local.detach().reshape(-1).view(_WORDS.get(local.element_size(), torch.int32))
    weights = torch.arange(min(_CHUNK, len(words)), device=words.device) * _ODD | 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for chunk in words.split(_CHUNK) if len(words) else ():
        total = total * _ODD + (chunk.to(torch.int64) * weights[: len(chunk)]).sum()
    return total
