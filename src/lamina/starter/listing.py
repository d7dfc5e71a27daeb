"""The names and types of a model, as patterns that can be copied into a rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..errors import printable
from ..model.parameters import ParamInfo
from .anatomy import Anatomy

#: longer lists are cut off
_MOST = 150
#: classes that say nothing of a parameter
_COMMON = ("Module", "object", "Protocol", "Generic")


def names_and_types(anatomy: Anatomy) -> list[str]:
    """Return a line for each family of parameters, and one for the classes that own parameters."""
    prefixes = [stack.prefix for stack in anatomy.stacks]
    by_name = {info.name: info for info in anatomy.infos}
    alike: dict[str, list[str]] = {}
    for name in by_name:
        alike.setdefault(_family(name, prefixes), []).append(name)
    rows = [
        (_pattern(names, prefixes), _shape([by_name[name] for name in names]))
        for names in alike.values()
    ]
    width = max(len(pattern) for pattern, _ in rows[:_MOST])
    lines = [f"{pattern:<{width}}  {shape}" for pattern, shape in rows[:_MOST]]
    if len(rows) > _MOST:
        lines.append(f"and {len(rows) - _MOST} more kinds of names")
    # A name may hold anything, but it must not end the line of a comment.
    every = (*lines, "", *_types(anatomy.infos))
    return [printable(line).replace("\n", "\\n") for line in every]


def _family(name: str, prefixes: Sequence[str]) -> str:
    """Return the same for names that differ in numbers of modules: `fc1` and `fc2` are words."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        prefix = _leading(prefixes, parts[:place], part)
        if part.isdigit() or prefix is not None:
            parts[place] = f"{part.rstrip('0123456789')}#"
    return ".".join(parts)


def _pattern(names: Sequence[str], prefixes: Sequence[str]) -> str:
    """Return a pattern for names that differ in numbers: {depth} for that of the layer, else *."""
    parts: list[str] = []
    first = names[0].split(".")
    for place, words in enumerate(zip(*(name.split(".") for name in names), strict=True)):
        prefix = _leading(prefixes, first[:place], words[0])
        if len(set(words)) == 1:
            parts.append(words[0])
        elif prefix is not None:
            parts.append(f"{prefix.rpartition('.')[2]}{{depth}}")
        else:
            parts.append("*")
    return ".".join(parts)


def _leading(prefixes: Sequence[str], before: Sequence[str], word: str) -> str | None:
    """Return the prefix of layers whose number is in this word behind these parts of a name."""
    stem = word.rstrip("0123456789")
    text = ".".join([*before, stem])
    return text if text in prefixes and word != stem else None


def _shape(infos: Sequence[ParamInfo]) -> str:
    """Return the shape, or that of the first to the last if they differ, and how many there are."""
    shapes = list(dict.fromkeys(" x ".join(map(str, info.shape)) or "1 number" for info in infos))
    shape = shapes[0] if len(shapes) == 1 else f"{shapes[0]} to {shapes[-1]}"
    count = f", {len(infos)} times" if len(infos) > 1 else ""
    others = [name for info in infos for name in info.names if name != info.name]
    tied = f", tied with {', '.join(others[:3])}" if others else ""
    return f"{shape}{count}{tied}"


def _types(infos: Sequence[ParamInfo]) -> list[str]:
    counts = Counter(
        kind
        for info in infos
        for kind in info.types
        if kind not in _COMMON and not kind.startswith("_")
    )
    listed = [f"type:{kind} ({count})" for kind, count in sorted(counts.items())]
    return ["Classes that own parameters, and how many:", *_wrapped(listed)]


def _wrapped(words: Sequence[str], width: int = 96) -> list[str]:
    lines = [""]
    for word in words:
        joined = f"{lines[-1]}  {word}".strip()
        if len(joined) > width:
            lines.append(word)
        else:
            lines[-1] = joined
    return lines
