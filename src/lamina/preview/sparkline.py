"""The lr of a group in a few characters of a table."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from .._util.text import sparkline

_BARS = "▁▂▃▄▅▆▇█"
_GAP = "·"
#: for terminals whose encoding lacks the bars: more ink is more, a gap is empty
_ASCII = str.maketrans(_BARS + _GAP, ".:-=+*#@ ")


def curve(values: npt.ArrayLike, width: int = 10, *, unicode: bool = True) -> str:
    """Draw a curve with bars, scaled from 0 to its own largest.

    Each bar is the mean of an equal share of the values. NaN stands for a frozen step; a share
    that is frozen throughout is a dot (empty in ASCII).

    Args:
        values: numbers of at least 0, or NaN; at least one.
        width: how many characters to draw; fewer values give fewer characters.
        unicode: whether the bars can be shown (see `can_show`).

    Example:
        >>> curve([0, 1, 2, 3, 4, 5, 6, 7])
        '▁▂▃▄▅▆▇█'
    """
    series = np.asarray(values, dtype=np.float64).reshape(-1)
    means = []
    for share in np.array_split(series, min(width, series.size)):
        known = share[np.isfinite(share)]
        means.append(float(known.mean()) if known.size else math.nan)
    text = sparkline(means, width).replace(" ", _GAP)
    return text if unicode else text.translate(_ASCII)


def can_show(stream: Any = None) -> bool:
    """Return whether a stream (standard output by default) can encode a preview."""
    encoding = getattr(sys.stdout if stream is None else stream, "encoding", None)
    try:
        (_BARS + _GAP + "–→…─").encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
