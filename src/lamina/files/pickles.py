"""Pickles read as data: nothing that they name is imported, and nothing is called.

The standard library's `pickletools` splits a pickle into instructions; the few that state needs are
followed here. What the pickle would call is kept as a `Call`, with the name as text.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, cast


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
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(cast("IO[bytes]", _Stream(file))):
            follow = _FOLLOWED.get(opcode.name)
            if follow is None:
                raise ValueError(f"the instruction {opcode.name}")
            follow(machine, argument)
        return machine.result()
    except (TypeError, LookupError, OverflowError, struct.error) as error:
        raise ValueError(str(error)) from error


class _Stream:
    """A file without `tell`, which `genops` would call for every instruction."""

    def __init__(self, file: IO[bytes]) -> None:
        self.read = file.read
        self.readline = file.readline


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        """Return the one value that is left."""
        [value] = self._stack
        return value

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self._stack.append(value)

    def _nothing(self, _: Any) -> None:
        pass

    def _popped(self, count: int) -> tuple[Any, ...]:
        taken = tuple(self._stack[-count:])
        if len(taken) < count:
            raise IndexError("an empty stack")
        del self._stack[-count:]
        return taken

    def _mark(self, _: Any) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _tuple(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def _tuple1(self, _: Any) -> None:
        self._stack.append(self._popped(1))

    def _tuple2(self, _: Any) -> None:
        self._stack.append(self._popped(2))

    def _tuple3(self, _: Any) -> None:
        self._stack.append(self._popped(3))

    def _memoize(self, place: int | None) -> None:
        self._memo[len(self._memo) if place is None else place] = self._stack[-1]

    def _recall(self, place: int) -> None:
        self._stack.append(self._memo[place])

    def _append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise TypeError("what is no list is appended to")
        self._stack[-1].extend(items)

    def _set_item(self, _: Any) -> None:
        self._update(list(self._popped(2)))

    def _set_items(self, _: Any) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        found = target.items if isinstance(target, Call) else target
        if type(found) is not dict:
            raise TypeError("what is no dict gets items")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _check_key(key)
            found[key] = value

    def _global(self, argument: str) -> None:
        self._stack.append(Name(argument.replace(" ", ".", 1)))

    def _stack_global(self, _: Any) -> None:
        module, name = self._popped(2)
        if type(module) is not str or type(name) is not str:
            raise TypeError("a name that is no text")
        self._stack.append(Name(f"{module}.{name}"))

    def _call(self, _: Any) -> None:
        called, args = self._popped(2)
        if not isinstance(called, Name) or type(args) is not tuple:
            raise TypeError("a call of what is no name")
        _check_call(called.text, args)
        self._stack.append(Call(called.text, args))

    def _build(self, _: Any) -> None:
        state = self._stack.pop()
        made = self._stack[-1]
        if not isinstance(made, Call) or made.state is not None:
            raise TypeError("attributes of what was not made")
        made.state = state

    def _persistent(self, _: Any) -> None:
        self._stack.append(Call("", (self._stack.pop(),)))


_LITERALS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
)
_FOLLOWED: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_LITERALS, _Machine.push),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _Machine._nothing),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "TUPLE1": _Machine._tuple1,
    "TUPLE2": _Machine._tuple2,
    "TUPLE3": _Machine._tuple3,
    "MARK": _Machine._mark,
    "TUPLE": _Machine._tuple,
    "MEMOIZE": _Machine._memoize,
    "BINPUT": _Machine._memoize,
    "LONG_BINPUT": _Machine._memoize,
    "BINGET": _Machine._recall,
    "LONG_BINGET": _Machine._recall,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_items,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._call,
    "NEWOBJ": _Machine._call,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persistent,
}

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
