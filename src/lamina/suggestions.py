"""The parameter names that a pattern which matches nothing most likely meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence


def closest(pattern: str, names: Sequence[str], limit: int = 3) -> list[str]:
    """The names closest to the pattern, compared part by part between the dots."""
    wanted = [part for part in re.split(r"[.\s|&!()]+", pattern) if part.strip("*?")]
    scored = [(_likeness(wanted, name), index) for index, name in enumerate(names)]
    best = sorted(scored, key=lambda item: (-item[0], item[1]))
    picked: list[str] = []
    shapes = set()
    for _, index in best:
        shape = re.sub(r"\d+", "0", names[index])  # one layer stands for all of its kind
        if shape not in shapes:
            shapes.add(shape)
            picked.append(names[index])
        if len(picked) == limit:
            break
    return picked


def _likeness(wanted: Sequence[str], name: str) -> float:
    parts = name.split(".")
    total = 0.0
    for word in wanted:
        if word == "{depth}":
            total += 0.5 * any(part.isdigit() for part in parts)
            continue
        word = word.removeprefix("type:").strip("*?")
        total += max(difflib.SequenceMatcher(None, word, part).ratio() for part in parts)
    return total
