"""A range test as a picture: loss over learning rate."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import require
from ..files.pictures import check_picture, write_picture
from .curve import Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _FAINT, _GRID, _CURVE, _MARK = "#24292f", "#6e7781", "#e4e7eb", "#0969da", "#bc4c00"


class Shown(Protocol):
    """What is drawn of a range test."""

    @property
    def curves(self) -> Sequence[Curve]: ...
    @property
    def suggestion(self) -> float | None: ...
    @property
    def interval(self) -> tuple[float, float] | None: ...
    @property
    def reference(self) -> str: ...
    @property
    def now(self) -> Mapping[str, float]: ...


def plot(found: Shown, path: str | os.PathLike[str] | None) -> Figure:
    """Draw a range test; see `FoundLR.plot`."""
    target = None if path is None else Path(path)
    if target is not None:
        check_picture(target)
    require("matplotlib", "plot", "FoundLR.plot()")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    for number, curve in enumerate(found.curves):
        label = "loss, smoothed" if number == 0 else None
        axes.plot(curve.lr, curve.loss, ".", color=_FAINT, alpha=0.35, markersize=3)
        axes.plot(curve.lr, curve.smooth, color=_CURVE, alpha=0.8, linewidth=1.6, label=label)
    if found.suggestion is not None and found.interval is not None:
        low, high = found.interval
        axes.axvspan(low, high, color=_MARK, alpha=0.15, linewidth=0, label="that of each repeat")
        label = f"suggestion {found.suggestion:.2g}"
        axes.axvline(found.suggestion, color=_MARK, linewidth=1.6, label=label)
    now = found.now[found.reference]
    axes.axvline(now, color=_INK, linewidth=1, linestyle=(0, (4, 3)), label=f"now {now:.2g}")
    axes.set_xscale("log")
    axes.set_ylim(*_range(found))
    axes.set_xlabel(f"learning rate of {found.reference}", color=_INK, parse_math=False)
    axes.set_ylabel("loss of a batch", color=_INK)
    title = "Learning-rate range test" + (": no suggestion" if found.suggestion is None else "")
    axes.set_title(title, loc="left", color=_INK, fontsize=12, fontweight="bold")
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=_FAINT, length=0)
    for spine in axes.spines.values():
        spine.set_color(_GRID)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK)
    if target is not None:
        write_picture(figure, target)
    return figure


def _range(found: Shown) -> tuple[float, float]:
    """Return what of the loss is shown: the fall, and the beginning of the explosion."""
    starts = [curve.loss[0] for curve in found.curves if curve.loss] or [0.0]
    bottoms = [min(curve.smooth) for curve in found.curves if curve.loss] or [0.0]
    top, bottom = max(starts), min(bottoms)
    margin = (top - bottom) or abs(top) or 1.0
    return bottom - 0.15 * margin, top + 0.5 * margin
