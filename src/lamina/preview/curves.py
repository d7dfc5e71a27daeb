"""Groups whose lr moves alike, drawn as one; and colours that show which belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .._util.folding import family
from .shown import Row, Shown

_LABEL = 34
#: told apart also by colour-blind readers (Okabe and Ito)
_DISTINCT = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5f66")
#: (colour map, from, to) of families: layers of one rule, from the lowest to the top
_RAMPS = (("YlGnBu", 0.38, 0.98), ("RdPu", 0.40, 0.95), ("YlOrBr", 0.35, 0.90), ("Greys", 0.4, 0.9))
_FROZEN = (0.55, 0.58, 0.62, 1.0)


@dataclass(frozen=True, eq=False)
class Course:
    """What groups with the same lr at every step share."""

    groups: tuple[str, ...]
    lr: npt.NDArray[np.float64]
    active: npt.NDArray[np.bool_]

    @property
    def label(self) -> str:
        """The shortest name among the groups, and how many there are."""
        text = ", ".join(self.groups)
        if len(text) <= _LABEL:
            return text
        more = f" ({len(self.groups)} groups)" if len(self.groups) > 1 else ""
        name, room = min(self.groups, key=len), _LABEL - len(more)
        tail = room // 3
        short = name if len(name) <= room else f"{name[: room - tail - 1]}…{name[-tail:]}"
        return short + more

    def spans(self) -> list[tuple[int, int]]:
        """Return where it trains: [first, last) as places in the samples."""
        edges = np.flatnonzero(np.diff(self.active.astype(np.int8), prepend=0, append=0))
        return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def courses(preview: Shown) -> list[Course]:
    """Return the distinct courses of a preview, in the order of their groups."""
    merged: dict[Any, list[Row]] = {}
    for row in preview.rows:
        # What never trains has no curve to share, so only layers of one rule are drawn as one.
        kind = "" if row.active.any() else family(row.group)
        merged.setdefault((kind, row.lr.tobytes(), row.active.tobytes()), []).append(row)
    return [
        Course(tuple(row.group for row in rows), rows[0].lr, rows[0].active)
        for rows in merged.values()
    ]


@dataclass(frozen=True)
class Twin:
    """A course with the lr of another one wherever both train.

    Args:
        base: the place of the other one, which trains for longer.
        rank: its place among the twins of that one, from 0.
        count: how many twins that one has.
    """

    base: int
    rank: int
    count: int


def twins(found: Sequence[Course]) -> dict[int, Twin]:
    """Return the courses that would hide another one in a picture, by their places.

    Each is the twin of one course alone, which is no twin itself.
    """
    order = sorted(range(len(found)), key=lambda place: -int(found[place].active.sum()))
    bases: list[int] = []
    alike: dict[int, list[int]] = {}
    for place in order:
        base = next((other for other in bases if _coincide(found[place], found[other])), None)
        if base is None:
            bases.append(place)
        else:
            alike.setdefault(base, []).append(place)
    return {
        place: Twin(base, rank, len(places))
        for base, places in alike.items()
        for rank, place in enumerate(places)
    }


def _coincide(one: Course, other: Course) -> bool:
    """Return whether two courses both train at some steps, with the same lr at all of them."""
    both = one.active & other.active
    if np.count_nonzero(both) < 2:
        return False
    return bool(np.allclose(one.lr[both], other.lr[both], rtol=1e-6, atol=0.0))


def colours(found: list[Course]) -> list[Any]:
    """Return a colour (red, green, blue, alpha) for each course.

    Courses whose names differ only in numbers (the layers of one rule) share a ramp; others get
    colours that are easy to tell apart. What never trains is grey.
    """
    from matplotlib import colormaps, colors

    families: dict[str, list[int]] = {}
    for index, course in enumerate(found):
        if course.active.any():
            families.setdefault(family(course.groups[0]), []).append(index)
    ramps = [members for members in families.values() if len(members) > 2]
    single = [members for members in families.values() if len(members) <= 2]
    lonely = [index for members in single for index in members]
    if len(lonely) > len(_DISTINCT):
        ramps, lonely = [*ramps, lonely], []
    palette: list[Any] = [_FROZEN] * len(found)
    for place, index in enumerate(lonely):
        palette[index] = colors.to_rgba(_DISTINCT[place])
    for place, members in enumerate(ramps):
        name, low, high = _RAMPS[place % len(_RAMPS)]
        shades = colormaps[name](np.linspace(low, high, len(members)))
        for index, shade in zip(members, shades, strict=True):
            palette[index] = tuple(map(float, shade))
    return palette
