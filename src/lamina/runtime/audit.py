"""Proof that what is frozen does not move: checksums of frozen tensors, compared at every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from .._util.sharding import local_part
from .._util.tensors import is_dtensor
from .._util.text import quoted
from ..errors import FrozenMovedError
from ..model.eval_lock import EvalLock, lock_of
from ..model.parameters import collect, tensors_by_name

#: integers of at most 32 bits: in the sum below, each then keeps at least 32 bits of its weight
_WORDS = {1: torch.int8, 2: torch.int16}
_CHUNK = 1 << 18

Groups = Sequence[Mapping[str, Any]]


class _Watched(NamedTuple):
    """A frozen tensor; `loose` may be exchanged for another object, which is taken as it is."""

    tensor: torch.Tensor
    loose: bool
    #: what keeps the module of a buffer in eval mode; None for a parameter
    held: EvalLock | None = None


class _Mark(NamedTuple):
    """What is remembered of a tensor."""

    identity: int
    shape: torch.Size
    dtype: torch.dtype
    checksum: int
    #: what held a buffer's module; one that was let go and held again is looked at anew
    held: EvalLock | None


class Audit:
    """Checksums of every frozen parameter, and of the buffers of modules held in eval mode.

    Tensors are read from their places in the model, so that one put there instead is compared too.
    Costs one reading of all of them before and after each step, and waits for an accelerator.
    """

    def __init__(self, model: nn.Module, on: bool) -> None:
        #: whether it was asked for; without it, nothing below is to be called but `forget`
        self.on = on
        self._model = model
        self._names = {item.info.name: item.info.names for item in collect(model)} if on else {}
        self._known: dict[str, _Mark] = {}

    def begin(self, groups: Groups, active: Sequence[bool | None]) -> None:
        """Take the checksums of what is frozen from now on; what was known stays known."""
        watched = self._frozen(groups, active)
        self._known = {name: mark for name, mark in self._known.items() if name in watched}
        new = {name: item for name, item in watched.items() if name not in self._known}
        self._known |= _marks(new)

    def forget(self) -> None:
        """Drop all checksums, because weights were loaded on purpose."""
        self._known = {}

    def check(
        self, groups: Groups, active: Sequence[bool | None], step: int, following: int
    ) -> None:
        """Compare what is frozen with its checksums, before `step` or on the way to `following`.

        Sharded tensors, and buffers that are not saved (caches), may be exchanged for other ones.

        Raises:
            FrozenMovedError: with the names of what moved.
        """
        watched = self._frozen(groups, active)
        watched = {name: watched[name] for name in self._known if name in watched}
        now = _marks(watched)
        moved = [name for name, mark in now.items() if self._moved(name, mark, watched[name].loose)]
        if moved:
            when = f"{'during' if following > step else 'before'} step {step}"
            params = [name for name in moved if watched[name].held is None]
            buffers = [name for name in moved if watched[name].held is not None]
            told = [self._params_moved(params, now, when)] if params else []
            told += [_buffers_moved(buffers, when)] if buffers else []
            raise FrozenMovedError(" ".join(told))
        self._known |= now

    def _moved(self, name: str, mark: _Mark, loose: bool) -> bool:
        known = self._known[name]
        if mark.held is not known.held or (loose and mark.identity != known.identity):
            return False
        return mark[1:4] != known[1:4]

    def _params_moved(self, names: Sequence[str], now: Mapping[str, _Mark], when: str) -> str:
        known, mark = self._known[names[0]], now[names[0]]
        if mark.shape != known.shape:
            how = f"has shape {tuple(mark.shape)} instead of {tuple(known.shape)}"
        elif mark.dtype != known.dtype:
            how = f"is {mark.dtype} instead of {known.dtype}"
        elif mark.identity != known.identity:
            how = "was replaced by a tensor with other numbers"
        else:
            how = "has other numbers"
        return (
            f"{quoted(names)} should be frozen, but moved {when}: {names[0]!r} {how}. Look for "
            "another optimizer, an averaging of weights or an assignment that writes it. If "
            "weights were loaded or converted on purpose, do that before Plan.build, or before "
            "the optimizer's load_state_dict."
        )

    def _frozen(self, groups: Groups, active: Sequence[bool | None]) -> dict[str, _Watched]:
        frozen: dict[str, _Watched] = {}
        live = tensors_by_name(self._model)
        for group, trains in zip(groups, active, strict=True):
            if trains:
                continue
            for known, param in zip(group["param_names"], group["params"], strict=True):
                for name in self._names[known]:
                    # FSDP2 exchanges its tensors in the model, for a while or for good.
                    loose = is_dtensor(param) or is_dtensor(live.get(name))
                    frozen[name] = _Watched(param if loose else live.get(name, param), loose)
        for path, module in self._model.named_modules():
            held = lock_of(module)
            if held is None:
                continue
            for name, buffer in module.named_buffers(path, recurse=False, remove_duplicate=False):
                saved = name.rpartition(".")[2] not in module._non_persistent_buffers_set
                frozen[name] = _Watched(buffer, not saved, held)
        return frozen


def _buffers_moved(names: Sequence[str], when: str) -> str:
    held = names[0].rpartition(".")[0]
    return (
        f"{quoted(names)} should rest, but moved {when}: {names[0]!r} is a buffer of "
        f"{f'the module {held!r}' if held else 'the model'}, which is kept in eval mode while all "
        "of its parameters are frozen. If its forward is to write it all the same, give the rule "
        "hold=False, and dropout and BatchNorm go on too; else look for an assignment to "
        "it, or to its module's `training`."
    )


def _marks(watched: Mapping[str, _Watched]) -> dict[str, _Mark]:
    tensors = {id(item.tensor): item.tensor for item in watched.values()}  # tied ones once
    totals = dict(zip(tensors, checksums(tensors.values()), strict=True))
    return {
        name: _Mark(id(it.tensor), it.tensor.shape, it.tensor.dtype, totals[id(it.tensor)], it.held)
        for name, it in watched.items()
    }


def _signed(number: int) -> int:
    """Return a number of 64 bits as torch's signed ones hold it."""
    return number - (1 << 64) if number >> 63 else number


_ODD = _signed(0x9E3779B97F4A7C15)


def checksums(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Return a number for each tensor that changes with any single element, and with their order.

    Formula: `sum_i word_i * w_i mod 2^64` over chunks, with odd weights `w_i`, so that no change of
    one word can vanish, and mixed, so that changes of several words with a pattern do not cancel;
    the sums of chunks are chained by an odd factor.
    """
    sums = [_checksum(tensor) for tensor in tensors]
    totals = [0] * len(sums)
    for device in {total.device for total in sums}:  # one wait for each device
        here = [index for index, total in enumerate(sums) if total.device == device]
        values = torch.stack([sums[index] for index in here]).tolist()
        for index, value in zip(here, values, strict=True):
            totals[index] = value
    return totals


@torch.no_grad()
def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    local = local_part(tensor)
    local = local.coalesce().values() if local.is_sparse else local
    local = torch.view_as_real(local.resolve_conj()) if local.is_complex() else local
    # A view of other words needs elements without gaps, also where there are none.
    flat = local.detach().resolve_neg().reshape(-1).contiguous()
    if not len(flat):
        flat = flat.new_empty(0)
    words = flat.view(_WORDS.get(local.element_size(), torch.int32))
    weights = _weights(words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for chunk in words.split(_CHUNK) if len(words) else ():
        total = total * _ODD + (chunk.to(torch.int64) * weights[: len(chunk)]).sum()
    return total


@lru_cache
def _weights(device: torch.device) -> torch.Tensor:
    """Return odd numbers of 64 bits without a pattern.

    References:
        Steele, Lea and Flood, Fast splittable pseudorandom number generators (2014), SplitMix.
    """
    with torch.inference_mode(False):
        mixed = torch.arange(1, _CHUNK + 1, device=device) * _ODD
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            logical = (mixed >> shift) & ((1 << (64 - shift)) - 1)  # `>>` alone repeats the sign
            mixed = (mixed ^ logical) * _signed(factor)
        return mixed | 1
