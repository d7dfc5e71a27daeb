"""How float32 results become 16-bit weights, so that small steps are not lost.

A bfloat16 weight has 8 significant bits: a step of less than 1/512 of it is lost in rounding to
the nearest. The setting `rounding` says what happens instead. It acts on bfloat16 and float16
parameters only. Every rule is computed in float32, from a float32 weight w to a result w':

    None, "nearest"   w = theta                    theta = nearest(w')
    "stochastic"      w = theta                    theta = up or down, the mean is w'
    "kahan"           w = theta + compensation     theta = nearest(w')
                                                   compensation = nearest(w' - theta)
    "master"          w = master                   master = w', theta = nearest(master)

`compensation` (in the parameter's dtype) and `master` (float32) lie in the optimizer's state. State
that has 16 bits itself is rounded stochastically under the last three, and beside float32 weights:
with beta2 = 0.999 a running mean of squares changes by less than half of its last bit, and to the
nearest it would never decay. Beside 16-bit weights that are rounded to the nearest it is rounded to
the nearest too, as torch does.

**The definition, which all kernels follow to the bit.** Arithmetic is modulo 2^32.

    mix(x)   = lowbias32: x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16
    fold(h, n)  = mix((h ^ n) + 0x9e3779b9)
    key      = fold(fold(fold(0, seed), step), stream)
    bits(i)  = mix(((i mod 2^32) ^ key) + floor(i / 2^32) * 0x9e3779b9)

- seed: crc32 of the parameter's name in UTF-8 where the batch has names, else its position in the
  batch. step: the parameter's own count of updates, this one included. stream: 0 for the weight,
  1 + k for the state entry `algorithm.buffers[k]`.
- i: how far the element lies from the parameter's first one in memory, in elements: its place in
  the flat memory of a dense tensor, whatever its shape. Of a DTensor, in the local part.
- stochastic(w'): inf, NaN and what rounds to the nearest inf become what nearest makes of them.
  A value beyond the largest finite one becomes that. Of any other value, as a float32 bit pattern
  without its sign, add bits mod 2^drop and clear the lowest `drop` bits: drop is 16 for bfloat16
  and 13 for float16. Float16 numbers below 2^-14 lie 2^-24 apart: 2^-14 is added to the absolute
  value before, in float32, and subtracted after. The sign stays, also that of 0.
- compensation is 0 where w' - theta is not finite.
- Weights that others changed win over what the state says of them: where nearest(theta +
  compensation * 127/128) is not theta, the compensation counts as 0; where nearest(master) is not
  theta, master becomes theta, before the rule.

Nothing is drawn from a generator: the same run draws the same bits, and a resumed one goes on with
them.

References:
    Gupta et al. 2015, "Deep learning with limited numerical precision" (stochastic rounding);
    Zamirai et al. 2020, "Revisiting BFloat16 training" (both forms for bfloat16 weights);
    Kahan 1965, "Further remarks on reducing truncation errors"; lowbias32: Chris Wellons 2018,
    "Prospecting for hash functions", public domain.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, TypeVar, final

import torch

from .._util.notices import warn
from .._util.sharding import local_part
from .._util.tensors import is_dtensor, waits
from .._util.text import listed
from ..errors import HyperparameterError, did_you_mean
from .base import HALF, ROUNDING_ENTRIES, Batch, Hyper, state_dtype_of

ROUNDINGS = ("nearest", "stochastic", "kahan", "master")
_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_SIGN = 1 << 31
#: bits of a float32 that the dtype does not keep
_DROPPED = {torch.bfloat16: 16, torch.float16: 13}
#: the smallest absolute value that is rounded to infinity
_RANGE = {torch.bfloat16: (2 - 2**-8) * 2.0**127, torch.float16: (2 - 2**-11) * 2.0**15}
#: the smallest normal number of float16
_SMALLEST = 2.0**-14
#: an integer, or a tensor of int64
Word = TypeVar("Word", int, torch.Tensor)


def rounding_name(where: str, value: Any) -> str | None:
    """Return a checked `rounding`; raises `HyperparameterError` with the choices."""
    if value is None or (isinstance(value, str) and value in ROUNDINGS):
        return value
    choices = ", ".join(map(repr, ROUNDINGS))
    raise HyperparameterError(
        f"{where} was given rounding={value!r}; expected None or one of {choices}."
        f"{did_you_mean(str(value), ROUNDINGS)}"
    )


def rounding_of(param: torch.Tensor, hyper: Hyper) -> str | None:
    """Return how the results of a parameter are rounded; None for to the nearest."""
    how = hyper.get("rounding")
    return None if how in (None, "nearest") or param.dtype not in HALF else how


def has_rounder(param: torch.Tensor, hyper: Hyper) -> bool:
    """Return whether something of a parameter, weight or state, is not rounded to the nearest."""
    return rounding_of(param, hyper) is not None or has_noisy_state(param, hyper)


def has_noisy_state(param: torch.Tensor, hyper: Hyper) -> bool:
    """Return whether the state of a parameter has 16 bits, and is rounded up or down by chance."""
    if state_dtype_of(param, hyper) not in HALF:
        return False
    return param.dtype is torch.float32 or rounding_of(param, hyper) is not None


def needed_entry(param: torch.Tensor, hyper: Hyper) -> str | None:
    """Return the key of the state tensor that the rounding of a parameter needs, or None."""
    return entry_of(rounding_of(param, hyper))


def settle_entries(param: torch.Tensor, entry: dict[str, Any], hyper: Hyper) -> None:
    """Add the state tensor that the rounding of a parameter needs, and drop one of another."""
    rounding_name("a parameter group", hyper.get("rounding"))  # it may have been set by hand
    wanted = needed_entry(param, hyper)
    for key in ROUNDING_ENTRIES:
        if key != wanted:
            entry.pop(key, None)
    if wanted is not None and wanted not in entry:
        entry[wanted] = initial_entry(param, wanted)


def initial_entry(param: torch.Tensor, key: str) -> torch.Tensor:
    """Return `compensation` or `master` of a parameter before its first update."""
    dtype = entry_dtype(param, key)
    new = torch.zeros_like(param, dtype=dtype, requires_grad=False)
    return new.copy_(param.detach()) if key == "master" else new


def entry_dtype(param: torch.Tensor, key: str) -> torch.dtype:
    """Return the dtype of `compensation` or `master`, whatever `state_dtype` says."""
    return torch.float32 if key == "master" else param.dtype


def entry_of(how: str | None) -> str | None:
    """Return the key of the state tensor that a form of rounding needs, or None."""
    return _ENTRY_OF.get(how or "")


_ENTRY_OF = {"kahan": "compensation", "master": "master"}


# --- random bits -----------------------------------------------------------------------------


def mix(x: Word) -> Word:
    """Return the hash of 32-bit words (lowbias32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def key_of(seed: int, step: Any, stream: int) -> Any:
    """Return the word that makes the bits of one tensor in one update its own.

    Args:
        seed: that of the parameter.
        step: its count of updates; a tensor (int64) gives a tensor, so that nobody waits for it.
        stream: 0 for the weight, 1 and above for its state.
    """
    key: Any = 0
    for word in (seed, step, stream):
        key = mix(((key ^ word) + _GOLDEN) & _MASK)
    return key


def random_bits(places: torch.Tensor, key: Any) -> torch.Tensor:
    """Return 32 random bits, as int32, for elements at some places of a tensor.

    Args:
        places: int64; or int32, whose arithmetic is faster, where all of them fit.
        key: from `key_of`.
    """
    if places.dtype is torch.int32:
        signed = key.to(torch.int32) if isinstance(key, torch.Tensor) else (key ^ _SIGN) - _SIGN
        return _mix_int32(places ^ signed)
    words = ((places & _MASK) ^ key) + (places >> 32) * _GOLDEN
    return _mix_int32(words.to(torch.int32))


def _mix_int32(x: torch.Tensor) -> torch.Tensor:
    """Do what `mix` does, in place, on words that are stored as int32: half the memory."""
    shifted = x >> 16
    shifted &= 0xFFFF  # int32 is shifted with its sign
    x ^= shifted
    x *= 0x7FEB352D
    torch.bitwise_right_shift(x, 15, out=shifted)
    shifted &= 0x1FFFF
    x ^= shifted
    x *= 0x846CA68B - 2**32
    torch.bitwise_right_shift(x, 16, out=shifted)
    shifted &= 0xFFFF
    x ^= shifted
    return x


def places_of(part: torch.Tensor, origin: int) -> torch.Tensor:
    """Return how far each element of a view lies from `origin` in memory, in elements."""
    first, device = int(part.storage_offset()) - origin, part.device
    rows = list(zip(part.shape, part.stride(), strict=True))
    last = first + sum((size - 1) * stride for size, stride in rows)
    dtype = torch.int32 if last < _SIGN else torch.int64
    if part.is_contiguous():
        places = torch.arange(first, first + part.numel(), dtype=dtype, device=device)
        return places.view(part.shape)
    places = torch.full((), first, dtype=dtype, device=device)
    for size, stride in rows:
        places = places.unsqueeze(-1) + torch.arange(size, dtype=dtype, device=device) * stride
    return places


# --- rounding --------------------------------------------------------------------------------


def round_stochastically(
    values: torch.Tensor, bits: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Round float32 values up or down to 16 bits, up as often as they lie close to it.

    Args:
        values: float32, of any shape.
        bits: int32 random bits of that shape; they are used up, to save memory.
        dtype: bfloat16 or float16.

    Returns:
        The rounded values; on average over all bits they are the values.

    Example:
        >>> import torch
        >>> value = torch.full((4,), 1 + 2**-8)  # between 1 and 1 + 2^-7
        >>> bits = torch.tensor([0, 0x7FFF, 0x8000, 0xFFFF], dtype=torch.int32)
        >>> round_stochastically(value, bits, torch.bfloat16).tolist()
        [1.0, 1.0, 1.0078125, 1.0078125]
    """
    largest = torch.finfo(dtype).max
    within = values.clamp(-largest, largest)
    if dtype is torch.float16:
        shift = ((within.abs() < _SMALLEST) * _SMALLEST).copysign_(within)
        exact = _truncate(within.add_(shift), bits, dtype).sub_(shift).copysign_(values)
    else:
        exact = _truncate(within, bits, dtype)
    rounded = exact.to(dtype)
    # Infinity and what rounds to it are not, nor is NaN, which is not below anything.
    is_kept = torch.abs(values, out=within) < _RANGE[dtype]
    if not waits(values.device) and bool(is_kept.all()):
        return rounded
    return torch.where(is_kept, rounded, values.to(dtype))


def _truncate(values: torch.Tensor, bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Add random bits to float32 patterns, in their place, and clear those that are not kept.

    The sign is the highest bit of a pattern, so that the absolute value grows.
    """
    kept = -1 << _DROPPED[dtype]
    bits &= ~kept
    bits += values.view(torch.int32)
    bits &= kept
    return bits.view(torch.float32)


def seed_of(batch: Batch, index: int) -> int:
    """Return the number that tells the random bits of one parameter from those of others."""
    if index < len(batch.names):
        return zlib.crc32(batch.names[index].encode())
    return index


@final
class Rounder:
    """The rounding of one parameter in one update.

    Args:
        batch: a batch whose steps include this update already.
        index: the position of the parameter, one for which `has_rounder` is true.
    """

    def __init__(self, batch: Batch, index: int) -> None:
        param = batch.params[index]
        self.batch, self.index = batch, index
        self.how = rounding_of(param, batch.hyper)
        #: the key of the state tensor of this rounding, or None
        self.entry = needed_entry(param, batch.hyper)
        #: the dtype of state that begins with this update
        self.state_dtype = state_dtype_of(param, batch.hyper)
        #: where the first element lies in its storage
        self.origin = int(local_part(param).storage_offset())
        step = batch.steps[index]
        self._step = step.to(torch.int64) if waits(step.device) else int(step)
        self._seed = seed_of(batch, index)

    def key(self, entry: str | None = None) -> Any:
        """Return the key of the random bits of a state entry; of the weight by default."""
        stream = 0 if entry is None else 1 + self.batch.algorithm.buffers.index(entry)
        return key_of(self._seed, self._step, stream)


@final
class RoundedPart:
    """Some elements of a parameter, in float32 while a rule updates them.

    Args:
        rounder: the rounding of the parameter.
        part: the parameter, or a view of some of its elements.
        extra: the same elements of the state tensor `rounder.entry`, if there is one.
    """

    def __init__(
        self, rounder: Rounder, part: torch.Tensor, extra: torch.Tensor | None = None
    ) -> None:
        self._rounder, self._part, self._extra = rounder, part, extra
        self._places: torch.Tensor | None = None

    def weight(self) -> torch.Tensor:
        """Return the float32 weight from which a rule begins; a master weight is itself."""
        if self._extra is None:
            return self._part.float()
        self._follow(local_part(self._part), local_part(self._extra))
        is_master = self._rounder.how == "master"
        return self._extra if is_master else self._part.float().add_(self._extra)

    def store(self, weight: torch.Tensor) -> None:
        """Write the float32 result of a rule into the weight, and its rest into the state."""
        if self._rounder.how is None:  # only the state is rounded by chance
            self._part.copy_(weight)
            return
        if self._extra is None:
            self._store_stochastically(weight, self._part, self._rounder.key())
            return
        if self._rounder.how == "kahan":
            nearest = weight.to(self._part.dtype)
            rest = weight - nearest
            self._extra.copy_(torch.where(rest.isfinite(), rest, torch.zeros_like(rest)))
        elif weight is not self._extra:
            self._extra.copy_(weight)
        self._part.copy_(weight)

    def store_state(self, key: str, value: torch.Tensor, state: torch.Tensor) -> None:
        """Write a float32 result into the same elements of a state tensor of any dtype."""
        if state.dtype in HALF:
            self._store_stochastically(value, state, self._rounder.key(key))
        elif value is not state:
            state.copy_(value)

    def _store_stochastically(self, value: torch.Tensor, into: torch.Tensor, key: Any) -> None:
        if self._places is None:
            self._places = places_of(local_part(self._part), int(self._rounder.origin))
        mine = local_part(into)
        bits = random_bits(self._places, key)
        mine.copy_(round_stochastically(_local_value(value, into), bits, mine.dtype))

    def _follow(self, part: torch.Tensor, extra: torch.Tensor) -> None:
        """Let the state follow a weight that others have changed since the last update."""
        if self._rounder.how == "master":
            expected, instead = extra.to(part.dtype), part.float()
        else:
            expected = part.float().add_(extra, alpha=127 / 128).to(part.dtype)
            instead = torch.zeros_like(extra)
        other = expected != part
        if waits(part.device):  # asked, the host would wait for the device
            torch.where(other, instead, extra, out=extra)
        elif bool(other.any()):
            torch.where(other, instead, extra, out=extra)
            if bool((other & ~part.isnan()).any()):
                batch = self._rounder.batch
                batch.followed.add(batch.name_of(self._rounder.index))


def _local_value(value: torch.Tensor, part: Any) -> torch.Tensor:
    """Return what of a result lies where the process' part of a tensor does."""
    if is_dtensor(value):
        held: Any = value
        return local_part(held.redistribute(part.device_mesh, part.placements))
    return value


_followed = attrgetter("followed")


def tell_followed(batches: Sequence[Batch]) -> None:
    """Warn of weights that somebody changed between two updates, once all of the step is done."""
    if not any(map(_followed, batches)):
        return
    names = sorted({name for batch in batches for name in batch.followed})
    for batch in batches:
        batch.followed.clear()
    if names:
        warn(
            f"the weights of {listed(names)} are not those that the optimizer left: its state "
            "('master' or 'compensation') follows them from here on. If they were loaded, load "
            "the optimizer's state that was saved with them too, or call "
            "optimizer.restart_state('*') after loading."
        )
