"""Pickles read as data: nothing that they name is imported, and nothing is called.

The standard library's unpickler follows the few instructions that state needs. What the pickle
would call is kept as a `Call`, with the name as text.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, NoReturn


@dataclass(frozen=True, eq=False)
class Name:
    """What a pickle would import, such as "torch.float32"."""

    text: str


@dataclass(eq=False)
class Call:
    """What a pickle would make by a call of what it imports; compared by identity.

    `state` are the attributes that it would set, `items` what it would put into a made dict.
    """

    name: str
    args: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


def parse(file: IO[bytes]) -> Any:
    """Return the value of the pickle that begins here, with `Name` and `Call` in it.

    Takes time and memory in proportion to the bytes that are read.

    Args:
        file: at the first byte of the pickle; afterwards behind it.

    Raises:
        ValueError: if it is damaged, has instructions that no state needs, or would take more
            memory than its size.
    """
    unpickler = _Unpickler(file, encoding="latin1")
    try:
        value = unpickler.load()
    except EOFError:
        raise ValueError("pickle exhausted before seeing STOP") from None
    except _DAMAGES as error:
        raise ValueError(str(error)) from error
    if unpickler.stack:
        raise ValueError("more than one value is left at its end")
    return value


_DAMAGES = (
    *(TypeError, LookupError, AttributeError, OverflowError),
    *(pickle.UnpicklingError, struct.error),
)
_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
#: instructions that are followed as the standard library does
_AS_USUAL = (
    *("PROTO", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"),
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    *("TUPLE1", "TUPLE2", "TUPLE3", "MARK", "TUPLE", "APPEND", "APPENDS"),
    *("MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "STACK_GLOBAL", "BINPERSID"),
)
_USUAL = {
    code: function
    for code, function in pickle._Unpickler.dispatch.items()
    if _NAMES[code] in _AS_USUAL
}


class _Followed(dict[int, Callable[[Any], None]]):
    """What instructions do, by their code; others are refused."""

    def __missing__(self, code: int) -> NoReturn:
        raise ValueError(f"the instruction {_NAMES.get(code, code)}")


class _Unpickler(pickle._Unpickler):
    """The standard library's in Python, which makes texts of what it would import and call.

    Its twin in C would take memory for every place of the memo, up to the highest that is named.
    """

    stack: list[Any]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Name:
        return Name(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Call:
        return Call("", (pid,))

    def _skip_frame(self) -> None:
        self.read(8)  # its length, for which the standard library takes memory

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _set_items(self) -> None:
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        found = target.items if isinstance(target, Call) else target
        if type(found) is not dict:
            raise TypeError("what is no dict gets items")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _check_key(key)
            found[key] = value

    def _call(self) -> None:
        args, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, Name) or type(args) is not tuple:
            raise TypeError("a call of what is no name")
        _check_call(called.text, args)
        self.stack.append(Call(called.text, args))

    def _build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if not isinstance(made, Call) or made.state is not None:
            raise TypeError("attributes of what was not made")
        made.state = state

    dispatch = _Followed(
        {
            **_USUAL,
            pickle.FRAME[0]: _skip_frame,
            pickle.SETITEM[0]: _set_item,
            pickle.SETITEMS[0]: _set_items,
            pickle.REDUCE[0]: _call,
            pickle.NEWOBJ[0]: _call,
            pickle.BUILD[0]: _build,
        }
    )


#: equal hashes of larger ones can be chosen, which makes a dict of them take quadratic time
_LARGEST_KEY = 2**60
_SIMPLE = (str, int, float, bool, bytes, type(None))


def _check_key(key: Any) -> None:
    """Raise for keys that take long to look up, or whose nesting would overflow the C stack."""
    for part in key if type(key) is tuple else (key,):
        if type(part) not in _SIMPLE and not isinstance(part, (Call, Name)):
            raise TypeError(f"a key of type {type(part).__name__}")
        if type(part) is int and abs(part) > _LARGEST_KEY:
            raise ValueError("a key that is too large a number")


def _check_call(name: str, args: tuple[Any, ...]) -> None:
    """Raise for calls that `torch.load` allows and that take memory or time without end."""
    kind = name.rpartition(".")[2]
    grows = (
        name == "torch.Tensor"
        or kind.endswith("Storage")
        or (kind == "bytearray" and not all(type(arg) in (bytes, str, Call) for arg in args))
        or (kind == "encode" and args[1:] != ("latin1",))
        or (kind == "OrderedDict" and bool(args))
        or (kind == "Counter" and not all(isinstance(arg, Mapping) for arg in args))
    )
    if grows:
        raise ValueError(f"a call of {name} with what no state has")
    if kind in ("set", "frozenset"):
        for arg in args:
            for item in arg:
                _check_key(item)
