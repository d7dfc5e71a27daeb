"""How threads in C come to a compiled loop: a function without the interpreter lock, by address."""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_INT64 = ir.IntType(64)


@intrinsic
def _count(typing: Any, words: Any) -> Any:
    """Return the first word and add 1 to it, in one go for all threads."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], _INT64(1), "monotonic")

    return types.int64(words), generate


@intrinsic
def _call(typing: Any, address: Any) -> Any:
    """Call a function in C that takes nothing and returns nothing."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), []).as_pointer()
        builder.call(builder.inttoptr(args[0], function), [])
        return context.get_dummy_value()

    return types.void(address), generate


def _enter(words: Any) -> None:
    """Call the function at the address in the third word, unless enough threads have done so.

    The first word counts the threads that came, and the second says how many are wanted.
    """
    wanted, address = numba.carray(words, 3)[1], numba.carray(words, 3)[2]
    if _count(words) < wanted:
        _call(address)


def _compiled() -> Any:
    signature = types.void(types.CPointer(types.int64))
    try:
        return numba.cfunc(signature, cache=True)(_enter)
    except Exception:  # there is no folder for the cache, or what lies there is damaged
        return numba.cfunc(signature)(_enter)


#: kept, as its machine code lives no longer than it
ENTER = _compiled()
