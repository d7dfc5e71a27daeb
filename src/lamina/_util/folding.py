"""Many names in few: those that differ only in numbers become one, with the range of each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"\d+")


def family(name: str) -> str:
    """Return the same text for names that differ only in numbers: the layers of one rule.

    Example:
        >>> family("layer.3.dense2.weight")
        'layer.#.dense#.weight'
    """
    return _NUMBER.sub("#", name)


def families(names: Iterable[str]) -> dict[str, list[str]]:
    """Return names by their family, in the order in which each family first comes."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(family(name), []).append(name)
    return found


def folded(names: Sequence[str]) -> str:
    """Return names of one family as one text, each number that differs as its range.

    Example:
        >>> folded(["layer.0.weight", "layer.1.weight", "layer.11.weight"])
        'layer.0–11.weight'
    """
    rows = [list(map(int, _NUMBER.findall(name))) for name in names]
    spans = [(min(column), max(column)) for column in zip(*rows, strict=True)]
    places = iter(str(low) if low == high else f"{low}–{high}" for low, high in spans)
    return _NUMBER.sub(lambda _: next(places), names[0])


class KnownNames:
    """All dotted names of a model, for short texts about some of them.

    Args:
        names: all of them.

    Example:
        >>> KnownNames(["a.x", "a.y", "b.x", "b.y"]).covered(["a.x", "a.y", "b.x"])
        ['a.*', 'b.x']
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._inside = Counter(prefix for name in names for prefix in _prefixes(name))

    def covered(self, names: Iterable[str]) -> list[str]:
        """Return patterns for names: of a module that is meant as a whole, one for the module."""
        chosen = list(dict.fromkeys(names))
        inside = Counter(prefix for name in chosen for prefix in _prefixes(name))
        found: dict[str, None] = {}
        for name in chosen:
            whole = (path for path in _prefixes(name) if inside[path] == self._inside[path])
            path = next(whole, None)
            found[name if path is None else f"{path}.*".lstrip(".")] = None
        return list(found)

    def folded(self, names: Iterable[str]) -> list[str]:
        """Return the same with names that differ only in numbers as one."""
        return [folded(each) for each in families(self.covered(names)).values()]


def _prefixes(name: str) -> list[str]:
    """Return the paths of the modules around a name, the outermost first, which is empty."""
    parts = name.split(".")
    return [".".join(parts[:size]) for size in range(len(parts))]
