"""Plans as text: values print as their constructor, and a small grammar reads them back.

    expression := product (">>" product)*
    product    := term ("*" term)*
    term       := "(" expression ")" | "[" [expression ("," expression)*] "]"
                | number [unit] | "x" number | string | name | name "(" [arguments] ")"
    arguments  := [name "="] expression ("," [name "="] expression)*
    unit       := "%" | "step(s)" | "epoch(s)"

Names are looked up in a table given by the caller and nowhere else: text is never evaluated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any, ClassVar, NoReturn

from ..errors import PlanError, did_you_mean

_TOKEN = re.compile(
    r"\s*(?:(?P<times>x(?=[\d.]))|(?P<name>[A-Za-z_][\w.]*)"
    r"|(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?P<unit>\s*(?:%|steps?\b|epochs?\b))?"
    r"|(?P<string>\"[^\"]*\"|'[^']*')|(?P<op>>>|[*(),=\[\]]))"
)
# A hostile plan must not reach Python's recursion limit, nor its limit on the digits of a number.
_MAX_DEPTH = 50
_MAX_PARTS = 100
_MAX_PARTS_IN_ALL = 200
_MAX_DIGITS = 100
_SHOWN = 120
#: words that are values
WORDS: dict[str, Any] = {"true": True, "false": False, "none": None, "inf": math.inf}


class Expression:
    """A frozen dataclass that prints as the call that makes it."""

    #: the name under which users call the constructor
    source_name: ClassVar[str]

    def source_text(self, quote: bool) -> str:
        """Return the constructor call; with `quote=False` as it stands in TOML text."""
        parts = [_argument(name, item, quote) for name, item in _given(self)]
        return f"{self.source_name}({', '.join(parts)})"

    def __repr__(self) -> str:
        return self.source_text(True)


def to_source(value: object, quote: bool = True) -> str:
    """Return a value as Python code, or with `quote=False` as it stands in TOML text."""
    if isinstance(value, Expression):
        return value.source_text(quote)
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(to_source(item, quote) for item in value) + "]"
    if value == math.inf:
        return 'float("inf")' if quote else "inf"
    if isinstance(value, float):
        return repr(float(value))  # also what NumPy made: its own repr cannot be read back
    if quote or not isinstance(value, (str, bool, type(None))):
        return repr(value)
    if isinstance(value, str):
        match = _TOKEN.fullmatch(value)
        return value if match and match["unit"] else f'"{value}"'
    return str(value).lower()


def _argument(name: str | None, value: object, quote: bool) -> str:
    text = to_source(value, quote)
    return f"{name}={text}" if name else text


def _given(value: Any) -> list[tuple[str | None, object]]:
    """Return the arguments that differ from their default: leading ones by position."""
    given: list[tuple[str | None, object]] = []
    leading = True
    for field in fields(value):
        if not field.init or not field.repr:
            continue
        item = getattr(value, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if default is not MISSING and type(item) is type(default) and item == default:
            leading = False
            continue
        given.append((None if leading and not field.kw_only else field.name, item))
    return given


def parse(text: str, names: Mapping[str, Callable[..., Any]], where: str) -> Any:
    """Read an expression; `names` are the constructors it may call, `where` is for errors."""
    return _Parser(text, names, where).whole()


def _piece(text: str, position: int = 0) -> str:
    """Return a text for an error message: of a long one the piece around a position."""
    begin = max(0, position - _SHOWN // 2)
    return text if len(text) <= _SHOWN else f"...{text[begin : begin + _SHOWN]}..."


class _Parser:
    def __init__(self, text: str, names: Mapping[str, Callable[..., Any]], where: str) -> None:
        self.text, self.names, self.where = text, names, where
        self.position = 0
        self.depth = 0
        self.joined = 0

    def fail(self, reason: str) -> NoReturn:
        text = _piece(self.text, self.position)
        stop = "" if reason.endswith("?") else "."
        raise PlanError(
            f"{self.where}: cannot read {text!r} at character {self.position + 1}: {reason}{stop}"
        )

    def peek(self) -> re.Match[str] | None:
        return _TOKEN.match(self.text, self.position)

    def take(self, *ops: str) -> bool:
        match = self.peek()
        if match and match["op"] in ops:
            self.position = match.end()
            return True
        return False

    def expect(self, op: str) -> None:
        if not self.take(op):
            self.fail(f"expected {op!r}")

    def whole(self) -> Any:
        value = self.expression()
        if self.text[self.position :].strip():
            self.fail("expected the end of the expression")
        return value

    def expression(self) -> Any:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            self.fail("it is nested too deeply")
        value = self.chain(">>", lambda: self.chain("*", self.term))
        self.depth -= 1
        return value

    def chain(self, op: str, part: Callable[[], Any]) -> Any:
        parts = [part()]
        while self.take(op):
            if len(parts) == _MAX_PARTS:
                self.fail(f"more than {_MAX_PARTS} parts are joined by {op!r}")
            parts.append(part())
            self.joined += 1  # in nested brackets too: compositions are trees, walked recursively
            if self.joined == _MAX_PARTS_IN_ALL:
                self.fail(f"more than {_MAX_PARTS_IN_ALL} parts are joined in all")
        value = parts[0]
        for other in parts[1:]:
            value = self.combine(op, value, other)
        return value

    def combine(self, op: str, left: Any, right: Any) -> Any:
        if not (isinstance(left, Expression) and isinstance(right, Expression)):
            self.fail(f"{op!r} joins two schedules")
        try:
            return left >> right if op == ">>" else left * right  # type: ignore[operator]
        except TypeError:
            self.fail(f"{op!r} joins two schedules")

    def term(self) -> Any:
        if self.take("("):
            value = self.expression()
            self.expect(")")
            return value
        if self.take("["):
            return tuple(self.expression() for _ in self.until("]"))
        match = self.peek()
        if not match or match["op"]:
            self.fail("expected a number, a time, a name or a call")
        self.position = match.end()
        if match["times"]:
            factor = self.term()
            if not isinstance(factor, (int, float)):
                self.fail("expected a number after 'x'")
            return self.call("times", [float(factor)], {})
        if match["number"]:
            if len(match["number"]) > _MAX_DIGITS:
                self.fail(f"a number has more than {_MAX_DIGITS} digits")
            return self.quantity(match)
        if match["string"]:
            return match["string"][1:-1]
        return self.named(match["name"])

    def quantity(self, match: re.Match[str]) -> Any:
        if match["unit"]:
            return f"{match['number']}{' ' * (match['unit'].strip() != '%')}{match['unit'].strip()}"
        text = match["number"]
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)

    def until(self, bracket: str) -> Iterator[None]:
        """Yield before each of the parts that commas separate, up to a closing bracket."""
        while not self.take(bracket):
            yield
            if not self.take(","):
                self.expect(bracket)
                return

    def named(self, name: str) -> Any:
        if name in WORDS:
            return WORDS[name]
        if not self.take("("):
            self.fail(f"{_piece(name)!r} is not a value{self.called(name)}")
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for _ in self.until(")"):
            key = self.keyword()
            if key is None:
                args.append(self.expression())
            elif key in kwargs:
                self.fail(f"{key!r} is given twice")
            else:
                kwargs[key] = self.expression()
        return self.call(name, args, kwargs)

    def called(self, name: str) -> str:
        """Return how a name is called, or which name was meant."""
        if name not in self.names:
            return f".{did_you_mean(name, self.names)}" if did_you_mean(name, self.names) else ""
        try:
            self.names[name]()
        except (TypeError, PlanError):  # it needs arguments
            return f"; a call is written {name}(...)"
        return f"; a call is written {name}()"

    def keyword(self) -> str | None:
        match = self.peek()
        if not match or not match["name"]:
            return None
        start, self.position = self.position, match.end()
        if self.take("="):
            return match["name"]
        self.position = start
        return None

    def call(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if name not in self.names:
            self.fail(
                f"{_piece(name)!r} is unknown.{did_you_mean(name, self.names)}".removesuffix(".")
            )
        try:
            return self.names[name](*args, **kwargs)
        except TypeError as error:
            self.fail(f"{name}(...) does not take these arguments ({error})")
        except PlanError as error:
            raise type(error)(f"{self.where}: {error}") from error
