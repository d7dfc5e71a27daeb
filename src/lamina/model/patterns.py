"""Patterns select parameters by whole name, layer number, module class or property.

    pattern := any ("|" any)*          any  := all ("&" all)*
    all     := "!" all | "(" pattern ")" | atom
    atom    := "type:" glob | "re:" expression-to-the-end | property op number | glob

In a glob `*` crosses dots, `?` is one character, `[a-z]` one of a set, `{a,b}` one of several
words, and `{depth}` captures a layer number. A glob without wildcards names a parameter or a
module with everything below it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NoReturn

import regex
import torch
from torch import nn

from ..errors import PatternError, shortened
from .name_index import ParameterIndex, needed_in_glob, needed_in_regex
from .parameters import ParamInfo

PatternLike = str | Callable[[ParamInfo], bool]

_COMPARISON = re.compile(r"(ndim|numel)\s*(<=|>=|==|!=|<|>)\s*(\d{1,18})(?!\d)")
_WORD = re.compile(r"(?:\{[^{}]*\}|\[[^\]]+\]|[^\s|&!(){}])+")
#: for a longer text, which may be hostile, nothing is proposed
LONG = 500
#: a pattern is written by hand; a longer one comes from a broken or hostile file
_LONGEST = 20_000
#: processor seconds for one pattern on one name; ordinary ones take microseconds
_TIME_LIMIT = 0.5
_ONE_DEPTH = "{depth} may be captured once in a pattern; write one rule for each capture"
_OPERATORS: dict[str, Callable[[int, int], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True)
class Pattern:
    """A pattern that was read.

    `matches` tells whether a parameter is selected (a tied one: by any of its names), `depths`
    which layer numbers are captured from its names; `captures` is how many `{depth}` there are;
    `candidates` finds the parameters of which alone some can match, or None for all.
    """

    matches: Callable[[ParamInfo], bool]
    depths: Callable[[ParamInfo], frozenset[int]] = lambda info: frozenset()
    captures: int = 0
    candidates: Callable[[ParameterIndex], Collection[int] | None] = lambda index: None

    def places(self, index: ParameterIndex) -> list[int]:
        """Return the places of the selected parameters, in order."""
        found = self.candidates(index)
        tried = range(len(index.infos)) if found is None else sorted(found)
        return [place for place in tried if self.matches(index.infos[place])]


def _of_names(text: str, is_regex: bool, captures: int) -> Pattern:
    """Return the pattern of a glob or a regular expression over whole parameter names."""
    needed = needed_in_regex(text) if is_regex else needed_in_glob(_glob_parts(text))

    def matches(info: ParamInfo) -> bool:
        return any(_matched(text, is_regex, name) for name in info.matched_names)

    def candidates(index: ParameterIndex) -> Collection[int] | None:
        return index.names.holding(needed)

    if not captures:
        return Pattern(matches, candidates=candidates)
    return Pattern(matches, lambda info: _depths(text, is_regex, info), captures, candidates)


def _of_types(text: str) -> Pattern:
    """Return the pattern of a glob over the classes of the modules that own a parameter."""
    needed = needed_in_glob(_glob_parts(text))
    return Pattern(
        lambda info: any(_matched(text, False, name) for name in info.types),
        candidates=lambda index: index.types.holding(needed),
    )


def _combined(parts: list[Pattern], decide: Callable[[Iterable[bool]], bool]) -> Pattern:
    """Return the pattern of several parts, of which `any` or `all` have to match."""

    def candidates(index: ParameterIndex) -> Collection[int] | None:
        found = [part.candidates(index) for part in parts]
        known = [its for its in found if its is not None]
        if decide is all:
            return min(known, key=len, default=None)
        return set().union(*known) if len(known) == len(found) else None

    def depths(info: ParamInfo) -> frozenset[int]:
        return frozenset().union(*(part.depths(info) for part in parts if part.matches(info)))

    return Pattern(
        lambda info: decide(part.matches(info) for part in parts),
        depths,
        sum(part.captures for part in parts),
        candidates,
    )


def compile_pattern(pattern: PatternLike) -> Pattern:
    """Read a pattern; raises `PatternError` with the place of the mistake."""
    if isinstance(pattern, str):
        return _parse(pattern)
    if callable(pattern) and not isinstance(pattern, (nn.Module, type)):
        return Pattern(lambda info: bool(pattern(info)))
    raise PatternError(
        f"{shown(pattern)} is not a pattern; expected a string such as 'encoder.*', "
        f"or a function (ParamInfo) -> bool.{_as_text(pattern)}"
    )


def shown(given: object) -> str:
    """Return something for an error message: of what prints over many lines its class."""
    is_long = isinstance(given, (nn.Module, torch.Tensor))
    return f"a {type(given).__name__}" if is_long else repr(given)


def _as_text(given: object) -> str:
    """Return how something that is no pattern is written as one, or an empty string."""
    if isinstance(given, (list, tuple)) and given and all(isinstance(one, str) for one in given):
        return f" Several patterns are one: {' | '.join(given)!r}."
    if isinstance(given, type) and issubclass(given, nn.Module):
        return f" The parameters of a class of modules are {f'type:{given.__name__}'!r}."
    if isinstance(given, nn.Module):
        return " A module is given by its name in the model."
    return ""


def is_regular(text: str) -> bool:
    """Return whether a text looks like a regular expression, and is one."""
    if len(text) > LONG or not re.search(r"\\[.dw]|\.[*+]|\)[$*+?]|^\^|\$$|\]\+|\(\?", text):
        return False
    try:
        _compile_regex(text)
    except _UNREADABLE:
        return False
    return True


@lru_cache(maxsize=1024)
def _parse(text: str) -> Pattern:
    if len(text) > _LONGEST:
        raise PatternError(
            f"a pattern of {len(text):,} characters was given, which begins {text[:60]!r}; "
            f"expected at most {_LONGEST:,}. Write several rules, or a function."
        )
    return _Parser(text).whole()


#: in Python's expressions a plain brace; the `regex` package would read approximate matching there
_PLAIN_BRACE = re.compile(r"(?<!\\)(?<!\\N)\{(?!\d+(?:,\d*)?\}|,\d+\})")


@lru_cache(maxsize=4096)
def _compile_regex(expression: str) -> regex.Pattern[str]:
    """Compile an expression of Python's syntax for the `regex` package, which keeps to a time."""
    re.compile(expression)
    return regex.compile(_PLAIN_BRACE.sub(r"\{", expression))


@lru_cache(maxsize=4096)
def _compile_glob(text: str) -> regex.Pattern[str]:
    """Translate a glob; what lies between two `*` is matched where it first occurs.

    A later place could only leave less of the name to the rest of the glob, so that the search is
    never taken up again: a name is read once, however many `*` there are. That needs a part of one
    length; others (`{a,bcd}`, `{depth}`) may be tried at several places.
    """
    parts = _glob_parts(text)
    if not any(part in "*?" or part.startswith("[") for part in parts):
        return regex.compile("".join(map(_part, parts)) + r"(?:\..*)?", regex.DOTALL)
    stars = [index for index, part in enumerate(parts) if part == "*"]
    pieces = [parts[begin + 1 : end] for begin, end in pairwise([-1, *stars, len(parts)])]
    expression = "".join(map(_part, pieces[0]))
    for index, piece in enumerate(pieces[1:], 1):
        inside = "".join(map(_part, piece))
        if index < len(pieces) - 1 and all(map(_has_one_length, piece)):
            expression += f"(?>.*?{inside})"
        else:
            expression += f".*{inside}"
    return regex.compile(expression, regex.DOTALL)


_PARTS = re.compile(r"\{[^{}]*\}|\[[^\]]+\]|.", re.DOTALL)


def _glob_parts(text: str) -> list[str]:
    """Split a glob into characters, wildcards, sets and words."""
    return _PARTS.findall(re.sub(r"\*+", "*", text))


def _part(part: str) -> str:
    """Return the regular expression of one part of a glob that is not `*`."""
    if part == "{depth}":
        return r"(?P<depth>\d+)"
    if part.startswith("{") and len(part) > 1:
        return "(?:" + "|".join(re.escape(word) for word in _words(part)) + ")"
    if part.startswith("[") and len(part) > 2:
        inside = re.sub(r"([\\\[&|~]|--)", r"\\\1", part[1:-1])
        return f"[^{inside[1:]}]" if inside[0] in "!^" else f"[{inside}]"
    return "." if part == "?" else re.escape(part)


def _words(part: str) -> list[str]:
    return [word.strip() for word in part[1:-1].split(",")]


def _has_one_length(part: str) -> bool:
    """Return whether everything that a part of a glob matches is equally long."""
    if part == "{depth}":
        return False
    return not part.startswith("{") or len(set(map(len, _words(part)))) == 1


def _matched(text: str, is_regex: bool, name: str) -> regex.Match[str] | None:
    """Match a whole name; raise `PatternError` if that takes too long."""
    compiled = _compile_regex(text) if is_regex else _compile_glob(text)
    try:
        return compiled.fullmatch(name, timeout=_TIME_LIMIT)
    except TimeoutError:
        raise PatternError(
            f"the pattern {shortened(text)!r} takes too long on the name {shortened(name)!r}: its "
            "repetitions can share the same characters in too many ways. "
            "Write fewer * or +, or plain names."
        ) from None


def _depths(text: str, is_regex: bool, info: ParamInfo) -> frozenset[int]:
    """Return the layer numbers that a pattern captures from the names of a parameter."""
    found = set()
    for name in info.matched_names:
        match = _matched(text, is_regex, name)
        captured = match["depth"] if match else None
        if captured is None:
            continue
        if not re.fullmatch(r"\d{1,18}", captured):
            raise PatternError(
                f"the pattern {shortened(text)!r} captures {shortened(captured)!r} from "
                f"{shortened(name)!r} as depth, which is no "
                r"layer number; let the group match digits only: (?P<depth>\d+)."
            )
        found.add(int(captured))
    return frozenset(found)


#: what compiling an expression can raise: contradictory flags, huge counts, deep nesting
_UNREADABLE = (re.error, regex.error, ValueError, OverflowError, RecursionError, MemoryError)


#: how other languages join patterns
_FOREIGN = (
    *((r"\s*\|\|\s*", " | "), (r"\s*&&\s*", " & "), (r"\s*,\s*(?![^{\[]*[}\]])", " | ")),
    *((r"\s+or\s+", " | "), (r"\s+and\s+", " & "), (r"\bnot\s+", "!"), (r"(type|re):\s+", r"\1:")),
)


def _meant(text: str) -> str:
    """Return how a text that cannot be read is written as a pattern, or an empty string."""
    if is_regular(text):
        return f" A regular expression is written {f're:{text}'!r}."
    written = text if len(text) <= LONG else ""
    for pattern, symbol in _FOREIGN:
        written = re.sub(pattern, symbol, written)
    if written in ("", text):
        return ""
    try:
        _Parser(written).whole()
    except PatternError:
        return ""
    return f" Write {written!r}."


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.position, self.depth = text, 0, 0

    def fail(self, reason: str) -> NoReturn:
        raise PatternError(
            f"cannot read the pattern {shortened(self.text)!r} at character "
            f"{self.position + 1}: {reason}.{_meant(self.text)}"
        )

    def whole(self) -> Pattern:
        pattern = self.either()
        self.space()
        if self.position < len(self.text):
            self.fail("expected '|', '&' or the end")
        if pattern.captures > 1:
            self.fail(_ONE_DEPTH)
        return pattern

    def space(self) -> None:
        while self.text[self.position : self.position + 1].isspace():
            self.position += 1

    def take(self, symbol: str) -> bool:
        self.space()
        if self.text.startswith(symbol, self.position):
            self.position += len(symbol)
            return True
        return False

    def either(self) -> Pattern:
        self.depth += 1
        if self.depth > 50:
            self.fail("it is nested too deeply")
        pattern = self.joined("|", any, lambda: self.joined("&", all, self.single))
        self.depth -= 1
        return pattern

    def joined(
        self, op: str, decide: Callable[[Iterable[bool]], bool], part: Callable[[], Pattern]
    ) -> Pattern:
        parts = [part()]
        while self.take(op):
            parts.append(part())
        return parts[0] if len(parts) == 1 else _combined(parts, decide)

    def single(self) -> Pattern:
        inverted = False
        while self.take("!"):
            inverted = not inverted
        if self.take("("):
            pattern = self.either()
            if not self.take(")"):
                self.fail("expected ')'")
        else:
            pattern = self.atom()
        if not inverted:
            return pattern
        # Its {depth} captures nothing, but is still one of those of which only one may be given.
        return Pattern(lambda info: not pattern.matches(info), captures=pattern.captures)

    def atom(self) -> Pattern:
        self.space()
        if self.take("re:"):
            return self.regex()
        compared = _COMPARISON.match(self.text, self.position)
        if compared:
            self.position = compared.end()
            key, compare, number = compared[1], _OPERATORS[compared[2]], int(compared[3])
            return Pattern(lambda info: compare(getattr(info, key), number))
        of_type = self.take("type:")
        word = _WORD.match(self.text, self.position)
        if not word:
            self.fail("expected a name, 'type:', 're:' or a property such as 'ndim<2'")
        if word[0].count("{depth}") > 1:
            self.fail(_ONE_DEPTH)
        try:
            _compile_glob(word[0])
        except _UNREADABLE as error:
            self.fail(f"the glob {shortened(word[0])!r} cannot be read ({error})")
        self.position = word.end()
        text = word[0]
        if of_type:
            return _of_types(text)
        return _of_names(text, False, text.count("{depth}"))

    def regex(self) -> Pattern:
        expression = self.text[self.position :].strip()
        try:
            groups = _compile_regex(expression).groupindex
        except _UNREADABLE as error:
            self.fail(f"the regular expression cannot be read ({error})")
        self.position = len(self.text)
        return _of_names(expression, True, int("depth" in groups))
