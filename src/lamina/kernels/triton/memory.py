"""How Triton programs find, read and write the elements of many tensors.

One launch updates all tensors of several batches. `table.py` says where they lie; each program
works on one chunk of one tensor. All arithmetic is in float32, and each result is rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import table

#: the columns of the table, for the programs
COUNT = tl.constexpr(table.COUNT)
GROUP = tl.constexpr(table.GROUP)
FIRST = tl.constexpr(table.FIRST)
CHUNKS = tl.constexpr(table.CHUNKS)
BLOCKS = tl.constexpr(table.BLOCKS)
STEP = tl.constexpr(table.STEP)
WIDTH = tl.constexpr(table.WIDTH)
MOST_CHUNKS = tl.constexpr(table.MOST_CHUNKS)
SCALE = tl.constexpr(table.SCALE)
FOUND_INF = tl.constexpr(table.FOUND_INF)
HYPER = tl.constexpr(table.HYPER)


@triton.jit
def find_chunk(chunks, rows, packet, BLOCK: tl.constexpr):
    """Return the tensor of this program, its group, and where its elements begin and end.

    `whole` is where the blocks end that need no mask: a load under a mask that may end anywhere
    is one load for each element. A step that found what is not finite has no elements.
    """
    row = rows + tl.load(chunks + tl.program_id(0)).to(tl.int64) * WIDTH
    group = packet + tl.load(row + GROUP)
    number = tl.program_id(0) - tl.load(row + FIRST)
    blocks = tl.load(row + BLOCKS)
    begin = number * blocks * BLOCK  # a multiple of BLOCK that the compiler can see
    end = tl.minimum(begin + blocks * BLOCK, tl.load(row + COUNT))
    found_inf = _scalar(tl.load(group + FOUND_INF), 0.0)
    end = tl.where(found_inf == 0, end, begin)
    whole = begin + (end - begin) // BLOCK * BLOCK
    return row, group, begin, whole, end


@triton.jit
def _scalar(address, other):
    """Return a float32 on the device, or `other` where there is none."""
    pointer = address.to(tl.pointer_type(tl.float32))
    return tl.load(pointer, mask=address != 0, other=other)


@triton.jit
def elements(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to the elements of a tensor; only aligned ones can be read four at once."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def read(pointer, start, end, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Return one block of elements in float32; 0 beyond the end."""
    offsets = start + tl.arange(0, BLOCK)
    if MASKED:
        values = tl.load(pointer + offsets, mask=offsets < end, other=0.0)
    else:
        values = tl.load(pointer + offsets)
    return values.to(tl.float32)


@triton.jit
def write(pointer, values, start, end, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Write one block of elements, rounded to the nearest of their dtype."""
    offsets = start + tl.arange(0, BLOCK)
    values = values.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + offsets, values, mask=offsets < end)
    else:
        tl.store(pointer + offsets, values)


@triton.jit
def exact_hyper(group, INDEX: tl.constexpr):
    """Return a hyperparameter of the group as the float64 that it was given as."""
    return tl.load(group + HYPER + INDEX).to(tl.float64, bitcast=True)


@triton.jit
def hyper(group, INDEX: tl.constexpr):
    """Return a hyperparameter of the group, for arithmetic with elements."""
    return exact_hyper(group, INDEX).to(tl.float32)


@triton.jit
def share(group, INDEX: tl.constexpr):
    """Return the share of a running mean that is kept, and the share of what is new.

    Their sum is 1 before they are rounded: in float32 the difference would lose digits.
    """
    kept = exact_hyper(group, INDEX)
    return kept.to(tl.float32), (1 - kept).to(tl.float32)


@triton.jit
def grad_factor(group):
    """Return what every gradient is multiplied by: the clip factor, -1 to go uphill, or both."""
    return _scalar(tl.load(group + SCALE), 1.0) * hyper(group, 0)


@triton.jit
def step_count(row):
    """Return how many updates the parameter had, with this one."""
    return tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32))).to(tl.float64)


@triton.jit
def numel(row):
    """Return how many elements the tensor has."""
    return tl.load(row + COUNT)


@triton.jit
def within(values, start, end, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Return the values of a block, with 0 beyond the end."""
    if MASKED:
        values = tl.where(start + tl.arange(0, BLOCK) < end, values, 0.0)
    return values


@triton.jit
def write_sum(sums, values, INDEX: tl.constexpr):
    """Write the sum over one chunk."""
    tl.store(sums + INDEX * tl.num_programs(0) + tl.program_id(0), tl.sum(values))


@triton.jit
def read_sum(sums, row, INDEX: tl.constexpr):
    """Return the sum over a tensor from those over its chunks, always added in the same order."""
    lanes = tl.arange(0, MOST_CHUNKS)
    first = sums + INDEX * tl.num_programs(0) + tl.load(row + FIRST)
    return tl.sum(tl.load(first + lanes, mask=lanes < tl.load(row + CHUNKS), other=0.0))
