"""A curve in one line of text."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCKS = "▁▂▃▄▅▆▇█"
#: for terminals whose encoding lacks the blocks: more ink is more
ASCII = ".:-=+*#@"
FROZEN = "·"


def sparkline(values: npt.ArrayLike, width: int = 10, *, unicode: bool = True) -> str:
    """Draw a curve with block characters, scaled from 0 to its own largest value.

    Each character stands for an equal share of the values and shows their largest, so that no
    peak is lost. NaN stands for a frozen step; a share that is frozen throughout is a dot (a
    space in ASCII).

    Args:
        values: numbers of at least 0, or NaN.
        width: how many characters to draw; fewer values give fewer characters.
        unicode: whether the block characters can be shown (see `can_show`).

    Example:
        >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7])
        '▁▂▃▄▅▆▇█'
    """
    series = np.asarray(values, dtype=np.float64).reshape(-1)
    levels = BLOCKS if unicode else ASCII
    known = series[np.isfinite(series)]
    peak = float(known.max()) if known.size else 0.0
    text = []
    for part in np.array_split(series, max(1, min(width, series.size))):
        alive = part[np.isfinite(part)]
        if not alive.size:
            text.append(FROZEN if unicode else " ")
            continue
        share = float(alive.max()) / peak if peak > 0 else 0.0
        text.append(levels[min(int(share * len(levels)), len(levels) - 1)])
    return "".join(text)


def can_show(stream: Any = None) -> bool:
    """Whether a stream (standard output by default) can encode the characters of a preview."""
    encoding = getattr(sys.stdout if stream is None else stream, "encoding", None)
    try:
        (BLOCKS + FROZEN + "–→…─").encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
