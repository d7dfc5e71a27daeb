"""Patterns that select given parameters of a model and no others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .._util.folding import KnownNames
from ..errors import PatternError
from ..model.parameters import ParamInfo
from ..model.patterns import compile_pattern
from .stacks import Stack


class Selector:
    """Writes patterns for parameters of a model, each tried on all of them.

    Args:
        infos: the parameters of the model.
    """

    def __init__(self, infos: Sequence[ParamInfo]) -> None:
        self._infos = infos
        self._known = KnownNames(info.name for info in infos)

    def pattern(self, names: Iterable[str]) -> str:
        """Return a pattern for exactly these parameters: modules where all of one is meant."""
        wanted = list(names)
        short = " | ".join(self._known.covered(wanted))
        by_leaf = " | ".join(dict.fromkeys(f"*.{name.rpartition('.')[2]}" for name in wanted))
        for text in sorted((short, by_leaf), key=len):
            if self.selects(text, wanted):
                return text
        # Names that the words of a pattern cannot hold, such as one with a space.
        return "re:" + "|".join(map(re.escape, wanted))

    def layers(self, stacks: Sequence[Stack]) -> str | None:
        """Return a pattern that captures the numbers of layers; None if there is none for them."""
        prefixes = [stack.prefix for stack in stacks]
        first = prefixes[0] if len(prefixes) == 1 else f"{{{','.join(prefixes)}}}"
        text = f"{first}{{depth}}.*"
        names = [name for stack in stacks for name in stack.names]
        return text if self.selects(text, names) else None

    def selects(self, text: str, names: Iterable[str]) -> bool:
        """Return whether a pattern selects exactly these parameters."""
        try:
            pattern = compile_pattern(text)
            found = {info.name for info in self._infos if pattern.matches(info)}
        except PatternError:
            return False
        return found == set(names)
