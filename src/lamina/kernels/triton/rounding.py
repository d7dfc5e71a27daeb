"""How float32 results become 16-bit weights on the device; `algorithms/rounding.py` defines it.

Every bit is as it is there. Words are 32 bits without a sign, whose arithmetic wraps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import table
from .memory import elements, read, step_count, write

#: the columns of the table, for the programs
WEIGHT = tl.constexpr(table.WEIGHT)
GRAD = tl.constexpr(table.GRAD)
STATE = tl.constexpr(table.STATE)
EXTRA = tl.constexpr(table.EXTRA)
SEED = tl.constexpr(table.SEED)

GOLDEN = tl.constexpr(0x9E3779B9)
SIGN = tl.constexpr(0x80000000)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
#: the smallest normal number of float16
SMALLEST = tl.constexpr(2.0**-14)


@triton.jit
def find_tensors(
    row,
    packet,
    WEIGHT_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Return pointers to weights, gradient, state and `extra`, and what rounds them.

    Pointers to what the rule or the rounding does not use are null. `extra` is the state of the
    rounding: a compensation, or master weights.
    """
    EXTRA_DTYPE: tl.constexpr = tl.float32 if ROUNDING == "master" else WEIGHT_DTYPE
    return (
        elements(tl.load(row + WEIGHT), WEIGHT_DTYPE, ALIGNED),
        elements(tl.load(packet + tl.load(row + GRAD)), GRAD_DTYPE, ALIGNED),
        elements(tl.load(row + STATE), STATE_DTYPE, ALIGNED),
        elements(tl.load(row + STATE + 1), STATE_DTYPE, ALIGNED),
        elements(tl.load(row + STATE + 2), STATE_DTYPE, ALIGNED),
        elements(tl.load(row + EXTRA), EXTRA_DTYPE, ALIGNED),
        update_key(row),
    )


@triton.jit
def _mix(x):
    """Return the hash of words (lowbias32)."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _fold(key, word):
    return _mix((key ^ word) + GOLDEN)


@triton.jit
def update_key(row):
    """Return the word that makes the random bits of one tensor in one update its own."""
    seed, step = tl.load(row + SEED).to(tl.uint32), step_count(row).to(tl.int64).to(tl.uint32)
    return _fold(_fold(tl.zeros_like(seed), seed), step)


@triton.jit
def random_bits(key, STREAM: tl.constexpr, start, BLOCK: tl.constexpr):
    """Return 32 random bits for each element of a block."""
    places = start + tl.arange(0, BLOCK).to(tl.int64)
    stream = tl.full([], STREAM, tl.uint32)
    words = places.to(tl.uint32) ^ _fold(key, stream)
    return _mix(words + (places >> 32).to(tl.uint32) * GOLDEN)


@triton.jit
def round_stochastically(values, bits, DTYPE: tl.constexpr):
    """Round float32 values up or down to 16 bits, up as often as they lie close to it."""
    if tl.bfloat16 == DTYPE:
        largest, reach = (2 - 2.0**-7) * 2.0**127, (2 - 2.0**-8) * 2.0**127
        within = tl.minimum(tl.maximum(values, -largest), largest)
        rounded = _truncate(within, bits, 0xFFFF)
    else:
        largest, reach = 65504.0, 65520.0
        within = tl.minimum(tl.maximum(values, -largest), largest)
        shift = _with_sign_of(tl.where(tl.abs(within) < SMALLEST, SMALLEST, 0.0), within)
        rounded = _with_sign_of(_truncate(within + shift, bits, 0x1FFF) - shift, values)
    # Of what lies further outside, and of NaN, which is not below anything.
    return tl.where(tl.abs(values) < reach, rounded.to(DTYPE), values.to(DTYPE))


@triton.jit
def _truncate(values, bits, DROPPED: tl.constexpr):
    """Add bits to float32 patterns and clear those that are not kept."""
    words = values.to(tl.uint32, bitcast=True) + (bits & DROPPED)
    return (words & (0xFFFFFFFF - DROPPED)).to(tl.float32, bitcast=True)


@triton.jit
def _with_sign_of(values, others):
    words = values.to(tl.uint32, bitcast=True) & (SIGN - 1)
    return (words | (others.to(tl.uint32, bitcast=True) & SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def read_weight(
    tensors, start, end, ROUNDING: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    """Return the float32 weights from which a rule begins.

    What others did to a weight since the last update wins over what the state says of it.
    """
    weights, extras = tensors[0], tensors[5]
    weight = read(weights, start, end, BLOCK, MASKED)
    if ROUNDING == "kahan":
        rest = read(extras, start, end, BLOCK, MASKED)
        expected = (weight + rest * (127 / 128)).to(weights.dtype.element_ty).to(tl.float32)
        weight = weight + tl.where(expected == weight, rest, 0.0)
    elif ROUNDING == "master":
        master = read(extras, start, end, BLOCK, MASKED)
        expected = master.to(weights.dtype.element_ty).to(tl.float32)
        weight = tl.where(expected == weight, master, weight)
    return weight


@triton.jit
def write_weight(
    tensors, weight, start, end, ROUNDING: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    """Write the float32 results of a rule into the weights, and their rest into the state."""
    weights, extras, key = tensors[0], tensors[5], tensors[6]
    DTYPE: tl.constexpr = weights.dtype.element_ty
    if ROUNDING == "stochastic":
        bits = random_bits(key, 0, start, BLOCK)
        write(weights, round_stochastically(weight, bits, DTYPE), start, end, BLOCK, MASKED)
    else:
        write(weights, weight, start, end, BLOCK, MASKED)
    if ROUNDING == "kahan":
        rest = weight - weight.to(DTYPE).to(tl.float32)
        rest = tl.where(tl.abs(rest) <= LARGEST_FLOAT, rest, 0.0)
        write(extras, rest, start, end, BLOCK, MASKED)
    elif ROUNDING == "master":
        write(extras, weight, start, end, BLOCK, MASKED)


@triton.jit
def read_state(tensors, INDEX: tl.constexpr, start, end, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Return one block of a state tensor in float32."""
    return read(tensors[2 + INDEX], start, end, BLOCK, MASKED)


@triton.jit
def write_state(
    tensors,
    INDEX: tl.constexpr,
    values,
    start,
    end,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write one block of a state tensor, whose stream of random bits follows the weight's."""
    pointer, key = tensors[2 + INDEX], tensors[6]
    DTYPE: tl.constexpr = pointer.dtype.element_ty
    if ROUNDING != "nearest" and tl.float32 != DTYPE:
        bits = random_bits(key, 1 + INDEX, start, BLOCK)
        write(pointer, round_stochastically(values, bits, DTYPE), start, end, BLOCK, MASKED)
    else:
        write(pointer, values, start, end, BLOCK, MASKED)
