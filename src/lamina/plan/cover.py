"""Short patterns that select given parameters of a model and no others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from heapq import heapify, heappop, heappush

from ..errors import PlanError
from ..model.parameters import ParamInfo
from ..model.patterns import compile_pattern

Names = frozenset[str]


class Cover:
    """Finds short patterns that select given parameters of a model and no others.

    Args:
        infos: the parameters of the model, by name.
        free: those that a pattern may select or not, since nothing trains them.
    """

    def __init__(self, infos: Mapping[str, ParamInfo], free: Names) -> None:
        self._infos = infos
        self._free = free
        self._all = frozenset(infos)
        self._atoms = _atoms(infos)

    def patterns(self, names: Names) -> list[str]:
        """Return patterns that select these parameters together; one wherever one can.

        Raises:
            PlanError: if a parameter cannot be selected alone.
        """
        # What the pattern language makes of a name is the judge. Odd names (of a ParameterDict) are
        # spelled as a regular expression, which takes each letter as it is.
        plain = sorted(names)
        spelled = f"re:{'|'.join(map(re.escape, plain))}"
        for text in (self._shortest(names), " | ".join(plain), spelled):
            if self._is_exact(text, names):
                return [text]
        if len(names) > 1:  # too long for one pattern, or one of the names is at fault
            half = len(plain) // 2
            parts = frozenset(plain[:half]), frozenset(plain[half:])
            return [text for part in parts for text in self.patterns(part)]
        raise PlanError(
            f"no pattern selects {plain[0]!r} and nothing else: the name of another parameter is "
            "the same once what PEFT adds is left out. Rename the adapter, or write the plan."
        )

    def _shortest(self, names: Names) -> str:
        free = self._free - names
        direct = self._union(names, names | free)
        others = self._all - names
        inverse = f"!({self._union(others - free, others)})" if others - free else "*"
        return inverse if 2 * len(inverse) < len(direct) else direct

    def _union(self, wanted: Names, allowed: Names) -> str:
        """Return a pattern that selects all that is wanted, and nothing that is not allowed."""
        fits = {text: its for text, its in self._atoms.items() if its <= allowed}
        for size in _SIZES & self._atoms.keys():
            for text, its in self._atoms.items():
                both = its & self._atoms[size]
                if text not in _SIZES and both and both <= allowed:
                    fits[f"{text} & {size}"] = both
        return " | ".join(_without_needless(_greedy(fits, wanted), fits, wanted))

    def _is_exact(self, text: str, names: Names) -> bool:
        try:
            pattern = compile_pattern(text)
        except PlanError:
            return False
        found = {name for name, info in self._infos.items() if pattern.matches(info)}
        return names <= found <= names | self._free


def _greedy(fits: Mapping[str, Names], wanted: Names) -> list[str]:
    """Choose patterns until all is selected: each selects the most of what is missing.

    What a pattern adds only falls while others are chosen, so it is counted again only when it
    comes up; else thousands of parameters would take minutes.
    """
    waiting = [(-len(its & wanted), len(text), text) for text, its in fits.items() if its & wanted]
    heapify(waiting)
    chosen: list[str] = []
    missing = set(wanted)
    while missing:
        _, size, text = heappop(waiting)
        adds = len(fits[text] & missing)
        if adds and waiting and (-adds, size, text) > waiting[0]:
            heappush(waiting, (-adds, size, text))
        elif adds:
            chosen.append(text)
            missing -= fits[text]
    return chosen


def _without_needless(chosen: list[str], fits: Mapping[str, Names], wanted: Names) -> list[str]:
    """Drop patterns whose parameters later choices select too."""
    times = Counter(name for text in chosen for name in fits[text] & wanted)
    kept = []
    for text in chosen:
        its = fits[text] & wanted
        if all(times[name] > 1 for name in its):
            times.subtract(its)
        else:
            kept.append(text)
    return kept


#: properties that divide matrices from norms and biases
_SIZES = {"ndim<2", "ndim>=2"}


def _atoms(infos: Mapping[str, ParamInfo]) -> dict[str, Names]:
    """Return simple patterns, each with the parameters that it selects."""
    found: dict[str, set[str]] = {"*": set(infos)}
    for name, info in infos.items():
        for text in _atoms_of(info):
            found.setdefault(text, set()).add(name)
    return {text: frozenset(names) for text, names in found.items()}


def _atoms_of(info: ParamInfo) -> Iterable[str]:
    yield "ndim<2" if info.ndim < 2 else "ndim>=2"
    for kind in info.types:
        if kind != "Module":
            yield f"type:{kind}"
    for name in info.matched_names:  # a pattern selects a tied parameter by any of its names
        yield from _names_of(name)


def _names_of(name: str) -> Iterable[str]:
    yield name
    parts = name.split(".")
    for size in range(1, len(parts)):
        yield ".".join(parts[:size]) + ".*"
        yield "*." + ".".join(parts[size:])
    for part in parts[1:-1]:
        yield f"*.{part}.*"
