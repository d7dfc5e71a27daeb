"""How compiled kernels read and write tensors: by address, one element at a time.

Every access belongs to a stream: the weights are one, the gradients another. Streams of a tensor
never overlap (`kernels/native` refuses tensors that do), and the compiler is told so: it would
otherwise compare all streams with each other before each loop, and give up on vector instructions
where there are many.

A bfloat16 travels as the 16 bits that it is. Reading it gives a float32 and writing rounds to the
nearest one, to the even one of two that are equally near.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

#: one for each tensor that an update touches: a weight, its gradient and its state
_STREAMS = 8
#: a checksum of all compiled code
_SOURCES = zlib.crc32(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
)
_INT16, _INT32, _INT64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()
_HELD = {types.uint16: _INT16, types.float32: _FLOAT, types.float64: _DOUBLE}


def compiled(function: Any, **options: Any) -> Any:
    """Compile a function at its first call, to run without the interpreter lock.

    The result is kept on disk for the next process, beside the source or in the user's cache
    folder; where neither can be written, each process compiles for itself. Arithmetic is that of
    IEEE 754, operation by operation, so that all processors give the same bits.
    """
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        made = numba.njit(function, cache=True, **options)
    except RuntimeError:  # there is no folder for the cache
        return numba.njit(function, **options)
    # Numba looks at the file of the function alone, and what it calls lies in others too.
    made._cache._cache_file._source_stamp = _SOURCES
    return made


def compiled_sums(function: Any) -> Any:
    """Compile as `compiled` does; sums may be made in several parts, with vector instructions."""
    return compiled(function, fastmath={"reassoc"})


@intrinsic(prefer_literal=True)
def load(typing: Any, address: Any, index: Any, like: Any, stream: Any) -> Any:
    """Return the element at an index, as a number to calculate with."""
    like = types.unliteral(like)
    result = types.float32 if like is types.uint16 else like
    signature = result(address, types.intp, like, stream)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_place(builder, args, like))
        _tell_stream(builder, value, stream.literal_value)
        if like is not types.uint16:
            return value
        return builder.bitcast(builder.shl(builder.zext(value, _INT32), _INT32(16)), _FLOAT)

    return signature, generate


@intrinsic(prefer_literal=True)
def store(typing: Any, address: Any, index: Any, like: Any, stream: Any, value: Any) -> Any:
    """Write a number to the element at an index, rounded to the nearest of its dtype."""
    like = types.unliteral(like)
    number = types.float32 if like is types.uint16 else like
    signature = types.void(address, types.intp, like, stream, number)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given = _to_bfloat16(builder, args[4]) if like is types.uint16 else args[4]
        _tell_stream(
            builder, builder.store(given, _place(builder, args, like)), stream.literal_value
        )
        return context.get_dummy_value()

    return signature, generate


def _place(builder: Any, args: Any, like: Any) -> Any:
    base = builder.inttoptr(args[0], _HELD[like].as_pointer())
    return builder.gep(base, [args[1]])


def _tell_stream(builder: Any, access: Any, stream: int) -> None:
    """Say that this access never touches what those of another stream touch."""
    module = builder.module
    domain = module.add_metadata(["lamina"])
    scopes = [module.add_metadata([f"stream {number}", domain]) for number in range(_STREAMS)]
    access.set_metadata("alias.scope", module.add_metadata([scopes[stream]]))
    others = [scope for number, scope in enumerate(scopes) if number != stream]
    access.set_metadata("noalias", module.add_metadata(others))


def _to_bfloat16(builder: Any, value: Any) -> Any:
    """Round to the upper 16 bits; a NaN becomes the quiet one, as in torch."""
    return builder.trunc(builder.lshr(_rounded(builder, value), _INT32(16)), _INT16)


def _rounded(builder: Any, value: Any) -> Any:
    """Return the 32 bits of a float32 that was rounded to the nearest bfloat16."""
    bits = builder.bitcast(value, _INT32)
    last = builder.and_(builder.lshr(bits, _INT32(16)), _INT32(1))
    rounded = builder.add(bits, builder.add(last, _INT32(0x7FFF)))
    upper = builder.and_(rounded, _INT32(0xFFFF0000))
    return builder.select(builder.fcmp_unordered("uno", value, value), _INT32(0x7FC00000), upper)


@intrinsic
def claim(typing: Any, counter: Any) -> Any:
    """Return the number in an array of one and add 1 to it, in one go for all threads."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.atomic_rmw("add", array.data, _INT64(1), "monotonic")

    return types.int64(counter), generate


@intrinsic
def as_number(typing: Any, value: Any, like: Any) -> Any:
    """Return a setting in the precision of the arithmetic for tensors like this one."""
    result = types.float64 if like is types.float64 else types.float32

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[0], signature.args[0], result)

    return result(value, like), generate


@intrinsic
def to_bits(typing: Any, value: Any) -> Any:
    """Return the pattern of a float32 as 32 bits."""
    signature = types.uint32(types.float32)
    return signature, lambda context, builder, signature, args: builder.bitcast(args[0], _INT32)


@intrinsic
def from_bits(typing: Any, bits: Any) -> Any:
    """Return the float32 of a pattern."""
    signature = types.float32(types.uint32)
    return signature, lambda context, builder, signature, args: builder.bitcast(args[0], _FLOAT)


@intrinsic
def nearest(typing: Any, value: Any) -> Any:
    """Round a float32 to the nearest bfloat16, as a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(_rounded(builder, args[0]), _FLOAT)

    return types.float32(types.float32), generate
