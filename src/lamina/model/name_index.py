"""Find which parameters a pattern can match without trying it on each of them.

Most patterns hold a text that a name must have, such as `17` in `layers.17.*`. An index from the
parts of all names to the parameters that have them leaves few parameters to try, so that the work
for many patterns grows with what they match and not with patterns times parameters.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property

from .parameters import ParamInfo

#: what a repetition begins with; it makes the character before it optional
_REPEAT = re.compile(r"[*+?]|\{(?:\d+(?:,\d*)?|,\d+)\}")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
#: groups that change nothing of what stands outside them: no flags, comments or conditions
_GROUP = re.compile(r"\((?!\?)|\(\?(?::|=|!|<|P<|P=|>)")
#: escapes that match one character of a kind, or none
_OPEN_ESCAPES = frozenset("dDwWsSbBAZ")


class TextIndex:
    """The parts between the dots of many texts, and the places of the texts that have them.

    Several texts may have one place; they come one after another.
    """

    def __init__(self, texts: Iterable[tuple[str, int]]) -> None:
        self.by_part: dict[str, list[int]] = {}
        for text, place in texts:
            for part in text.split("."):
                its = self.by_part.setdefault(part, [])
                if not its or its[-1] != place:
                    its.append(place)

    def holding(self, needed: Iterable[str]) -> Collection[int] | None:
        """Return the places of the texts that can hold all of the needed texts; None for any.

        Args:
            needed: texts that occur in `.text.`: a dot at an end of one is that of a part, too.
        """
        pieces = [text.split(".") for text in needed]
        whole = [part for piece in pieces for part in piece[1:-1]]
        found: Collection[int] | None = min(
            (self.by_part.get(part, ()) for part in whole), key=len, default=None
        )
        if found is not None and len(found) <= len(self.by_part):
            return found
        # Looking through all distinct parts is worth it only where it can leave fewer places.
        ends = (part for piece in pieces for part in (piece[0], piece[-1]))
        cut = max(ends, key=len, default="")
        if not cut:
            return found
        places: set[int] = set()
        for part, its in self.by_part.items():
            if cut in part:
                places.update(its)
        return places if found is None or len(places) < len(found) else found


class ParameterIndex:
    """Parameters in order, found by what their names or the classes of their modules hold."""

    def __init__(self, infos: Sequence[ParamInfo]) -> None:
        self.infos = infos

    @cached_property
    def names(self) -> TextIndex:
        """The parameters by the names that patterns look at."""
        rows = enumerate(self.infos)
        return TextIndex((name, place) for place, info in rows for name in info.matched_names)

    @cached_property
    def types(self) -> TextIndex:
        """The parameters by the classes of their modules."""
        rows = enumerate(self.infos)
        return TextIndex((name, place) for place, info in rows for name in info.types)


def needed_in_glob(parts: Sequence[str]) -> list[str]:
    """Return the texts that `.name.` must hold for a glob to match it.

    Args:
        parts: the characters, wildcards, sets and words of the glob, in order.
    """
    runs = [""]
    for part in [".", *parts, "."]:
        if len(part) > 1 or part in "*?":
            runs.append("")
        else:
            runs[-1] += part
    return [run for run in runs if run]


def needed_in_regex(expression: str) -> list[str]:
    """Return texts that `.name.` must hold for a regular expression to match a whole name.

    Only what is certain is returned. An expression that is not understood in full (flags,
    alternatives outside of groups, rare escapes) needs nothing: it is tried on every name.
    """
    runs, position, depth = ["."], 0, 0
    position += expression.startswith("^")
    while position < len(expression):
        symbol = expression[position]
        token, literal = _token(expression, position)
        if not token or (symbol == "|" and not depth):
            return []
        position += len(token)
        depth += (symbol == "(") - (symbol == ")")
        if literal and not depth:
            runs[-1] += literal
        elif _REPEAT.fullmatch(token):
            runs[-1] = runs[-1][:-1]  # the repeated character, which may also be there no time
            runs.append("")
        elif token == "$" and position == len(expression):
            break
        elif runs[-1]:
            runs.append("")
    runs[-1] += "."
    return [run for run in runs if run]


def _token(expression: str, position: int) -> tuple[str, str]:
    """Return the token at a place ("" for one not understood), and the character it stands for."""
    symbol, after = expression[position], expression[position + 1 : position + 2]
    if symbol == "\\":
        is_literal = bool(after) and not after.isalnum()
        token = symbol + after if is_literal or after in _OPEN_ESCAPES else ""
        return token, after if is_literal else ""
    if symbol in "[(*+?{":
        kind = {"[": _CLASS, "(": _GROUP}.get(symbol, _REPEAT)
        match = kind.match(expression, position)
        return (match[0] if match else ""), ""
    if symbol in "]}":
        return "", ""
    return symbol, "" if symbol in ".^$|)" else symbol
